"""The peers' configs: PolyNeXt's recipes with another backbone; segmentors learn and predict."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint

from polynext_mm.weights import CheckpointError
from tests.configs.segmentors import assert_a_step_trains_everything, assert_it_predicts
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.marks import some_slow

PEERS = {'convformer_s18': 'cpolynext_s', 'caformer_s18': 'apolynext_s'}
RECIPES = ('upernet_{}_ade20k', 'mask_rcnn_{}_coco_1x')
EACH = pytest.mark.parametrize('arch', PEERS)


def config(recipe: str, arch: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{recipe.format(arch)}.py')


@EACH
@pytest.mark.parametrize('recipe', RECIPES)
def test_the_backbone_alone_differs(recipe, arch):
    """And the two clips, which only APolyNeXt's recipe has."""
    peer, ours = config(recipe, arch), config(recipe, PEERS[arch])
    backbone = peer.model.pop('backbone')
    assert backbone == dict(
        type='MetaFormer',
        arch=arch,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=backbone.drop_path_rate,
        init_cfg=dict(type='Pretrained', checkpoint=f'timm://{arch}.sail_in1k'),
    )
    assert ours.model.pop('backbone').type == 'PolyNeXt'
    ours.optim_wrapper.pop('clip_grad', None)
    for model in (peer.model, ours.model):
        for part in ('decode_head', 'auxiliary_head', 'neck'):
            model.get(part, {}).pop('in_channels', None)
    assert peer.to_dict() == ours.to_dict()


@EACH
def test_published_figure_and_drop_path_of_the_segmentor(arch):
    comment = (ROOT / 'configs' / f'upernet_{arch}_ade20k.py').read_text().split('_base_')[0]
    figure, rate = {'convformer_s18': ('48.6', 0.3), 'caformer_s18': ('48.9', 0.2)}[arch]
    assert f'Published: {figure} mIoU' in comment
    assert config(RECIPES[0], arch).model.backbone.drop_path_rate == rate


@pytest.mark.heavy
@pytest.mark.parametrize('arch', some_slow(PEERS, ['convformer_s18']))
def test_a_segmentors_step_and_prediction(arch):
    model = assert_a_step_trains_everything(config(RECIPES[0], arch), 150)
    assert_it_predicts(model, 150)


@EACH
@pytest.mark.parametrize('no_decay', ['released', 'paper'])
def test_parameter_groups(arch, no_decay):
    """Of the backbone, output norms and learned scales do not decay; 'paper' exempts all norms."""
    cfg = config(RECIPES[0], arch)
    cfg.model.backbone.init_cfg = None
    cfg.optim_wrapper.paramwise_cfg.no_decay = no_decay
    with torch.device('meta'):
        model = build_model(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    settings = {
        id(param): (group['lr'], group['weight_decay'])
        for group in groups
        for param in group['params']
    }
    lr = cfg.optim_wrapper.optimizer.lr
    for name, param in model.named_parameters():
        head = not name.startswith('backbone.')
        norm = '.norm' in name or '.bn.' in name
        scale = param.ndim == 1 and not norm and not head and not name.endswith('conv.bias')
        exempt = scale or '.out_norms.' in name or (no_decay == 'paper' and norm)
        assert settings[id(param)] == (10 * lr if head else lr, 0.0 if exempt else 0.05), name


def test_whole_checkpoints_are_checked_strictly(tmp_path):
    """mm itself only warns of heads that do not fit."""
    cfg = config(RECIPES[0], 'convformer_s18')
    with torch.device('meta'):
        model = build_model(cfg)
    model.to_empty(device='cpu')
    weights = {key: torch.zeros_like(weight) for key, weight in model.state_dict().items()}
    path = tmp_path / 'peer.pth'
    torch.save(dict(state_dict=weights), path)
    load_checkpoint(model, str(path))
    del weights['decode_head.conv_seg.bias']
    torch.save(dict(state_dict=weights), path)
    with pytest.raises(CheckpointError, match='peer.pth does not fit: 1 missing: decode_head.conv'):
        load_checkpoint(model, str(path))
