"""The README's lines in mmseg's own model configs, with heads of several kinds."""

import re

import pytest
import torch
from mmengine.config import Config

from helpers import ROOT, build, build_model, mm_folder

WIDTHS = (72, 144, 288, 432)
# what a head needs besides the lines of the README: the widths of the outputs that it uses
HEADS = {
    'pspnet_r50-d8': dict(
        decode_head=dict(in_channels=WIDTHS[3]), auxiliary_head=dict(in_channels=WIDTHS[2])
    ),
    'deeplabv3plus_r50-d8': dict(
        decode_head=dict(in_channels=WIDTHS[3], c1_in_channels=WIDTHS[0]),
        auxiliary_head=dict(in_channels=WIDTHS[2]),
    ),
    'fpn_r50': dict(),
    'ocrnet_r50-d8': {
        'decode_head.0.in_channels': WIDTHS[2],
        'decode_head.1.in_channels': WIDTHS[2],  # at the stride of the other, as in mmseg
        'decode_head.1.in_index': 2,
    },
}


def readme_lines() -> dict:
    """The model settings of the README's example, without the checkpoint."""
    text = (ROOT / 'README.md').read_text().split('## In your own mmseg or mmdet project')[1]
    lines = Config.fromstring(re.search(r'```python\n(.*?)```', text, re.DOTALL)[1], '.py').model
    assert lines.backbone.pop('init_cfg').type == 'Pretrained'
    return lines


def config(name: str, **settings) -> Config:
    """A config of mmseg's with the README's lines and ``settings`` merged into its model."""
    cfg = Config.fromfile(mm_folder('mmseg') / 'configs' / '_base_' / 'models' / f'{name}.py')
    cfg.default_scope = 'mmseg'
    lines = readme_lines()
    if 'neck' not in cfg.model:
        del lines['neck']
    cfg.merge_from_dict(dict(model=lines))
    cfg.merge_from_dict({f'model.{key}': value for key, value in settings.items()})
    return cfg


@pytest.mark.parametrize('name', HEADS)
def test_the_readmes_lines_make_a_segmentor(name):
    cfg = config(name, **HEADS[name])
    assert cfg.model.type in ('EncoderDecoder', 'CascadeEncoderDecoder')
    model = build_model(cfg).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    assert logits.shape[:2] == (1, 19) and logits.isfinite().all()


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('weights', ['open-mmlab://resnet50_v1c', 'cpolynext_s.pt'])
def test_pretrained_weights_of_the_segmentor_are_refused_with_what_to_write(name, weights):
    cfg = config(name, pretrained=weights, **HEADS[name])
    with pytest.raises(ValueError, match='set by init_cfg') as caught:
        build_model(cfg)
    message = str(caught.value)
    assert repr(weights) in message and 'pretrained=None' in message
    assert "init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s')" in message


def test_pretrained_none_is_no_setting():
    settings = dict(pretrained=None)
    assert build(**settings).init_cfg is None
    assert settings == dict(pretrained=None)
