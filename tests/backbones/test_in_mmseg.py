"""The README's lines in mmseg's own model configs, with heads of several kinds."""

import re

import pytest
import torch
from mmengine.config import Config

from tests.helpers.configs import build_model
from tests.helpers.files import ROOT, mm_folder
from tests.helpers.networks import build

WIDTHS = (72, 144, 288, 432)
# what heads need besides the README's lines: the widths of the outputs that they use
HEADS = {
    'upernet_r50': dict(),
    'pspnet_r50-d8': dict(
        decode_head=dict(in_channels=WIDTHS[3]), auxiliary_head=dict(in_channels=WIDTHS[2])
    ),
    'deeplabv3plus_r50-d8': dict(
        decode_head=dict(in_channels=WIDTHS[3], c1_in_channels=WIDTHS[0]),
        auxiliary_head=dict(in_channels=WIDTHS[2]),
    ),
    'fpn_r50': dict(neck=dict(in_channels=list(WIDTHS))),
    'ocrnet_r50-d8': {
        'decode_head.0.in_channels': WIDTHS[2],
        'decode_head.1.in_channels': WIDTHS[2],  # the two heads share a stride, as in mmseg
        'decode_head.1.in_index': 2,
    },
}


def readme_lines() -> dict:
    """Return the model settings of the README's example, without the checkpoint."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "type='PolyNeXt'" in block]
    lines = Config.fromstring(block, '.py').model
    assert lines.backbone.pop('init_cfg').type == 'Pretrained'
    return lines


def config(name: str, **settings) -> Config:
    """Merge the README's lines and settings of the model into a config of mmseg's."""
    cfg = Config.fromfile(mm_folder('mmseg') / 'configs' / '_base_' / 'models' / f'{name}.py')
    cfg.default_scope = 'mmseg'
    lines = readme_lines()
    if HEADS[name]:  # the README's heads are those of UperNet
        del lines['decode_head'], lines['auxiliary_head']
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
