"""Parameters and multiply-adds: the published tables, and every way of computing counted alike."""

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from polynext_mm.analysis import Cost, NeedsValuesError, count, count_config, table
from polynext_mm.nn import PolyNeXtClassifier, plain_ops
from tests.helpers.files import ROOT
from tests.helpers.networks import build
from tests.helpers.programs import call_tool
from tests.nn.test_polynext import PUBLISHED

pytestmark = pytest.mark.heavy

UPERNET = {
    'cpolynext_s': (54, 942),
    'apolynext_s': (55, 1121),
    'convformer_s18': (54, 925),
    'caformer_s18': (54, 1024),
}
# as printed by the peers' authors
PEERS = {
    'convformer_s18': (27, 3.9),
    'convformer_s36': (40, 7.6),
    'convformer_m36': (57, 12.8),
    'caformer_s18': (26, 4.1),
    'caformer_s36': (39, 8.0),
    'caformer_m36': (56, 13.2),
}


def config(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def on_meta(builder, *args, **options) -> nn.Module:
    with torch.device('meta'):
        return builder(*args, **options)


# The published tables


@pytest.mark.parametrize('arch', ['cpolynext_t', 'apolynext_s'])
def test_the_papers_imagenet_table(arch):
    """tests/nn compares all archs with it."""
    millions, gmacs, _ = PUBLISHED[arch]
    cost = count(on_meta(PolyNeXtClassifier, arch), (3, 224, 224))
    assert f'{cost.parameters / 1e6:.{1 if "." in millions else 0}f}' == millions
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.06)
    assert cost.flops == 2 * cost.macs


@pytest.mark.parametrize('arch', PEERS)
def test_the_peers_imagenet_table(arch):
    millions, gmacs = PEERS[arch]
    cost = count(on_meta(timm.create_model, arch), (3, 224, 224))
    assert round(cost.parameters / 1e6) == millions
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.parametrize('arch', UPERNET)
def test_the_papers_upernet_table(arch):
    """Its parameters include the auxiliary head, which only trains; its MACs do not."""
    millions, gmacs = UPERNET[arch]
    cost = count_config(config(f'upernet_{arch}_ade20k'))
    assert cost.shape == (3, 512, 2048)
    assert round(cost.parameters / 1e6) == millions
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.002)
    assert cost.parts['auxiliary_head'].macs is None
    assert cost.parts['backbone'].macs + cost.parts['decode_head'].macs == cost.macs
    assert round((cost.parameters - cost.parts['auxiliary_head'].parameters) / 1e6) == millions - 1


# Every form counts alike


def test_kernels_plain_forms_and_real_tensors():
    model, shape = on_meta(build), (3, 64, 96)
    cost = count(model, shape)
    with plain_ops():
        assert count(model, shape).macs == cost.macs
    assert count(build(), shape).macs == cost.macs


def test_attention_of_the_peers_fused_and_not():
    costs = []
    for fused in (True, False):
        for model in (
            on_meta(timm.create_model, 'caformer_s18'),
            timm.create_model('caformer_s18'),
        ):
            for module in model.modules():
                if hasattr(module, 'fused_attn'):
                    module.fused_attn = fused
            costs.append(count(model, (3, 64, 64)).macs)
    assert len(set(costs)) == 1


def test_torchs_own_attention_layer():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0]

    tokens, width = 5 * 6, 16
    assert count(SelfAttention(), (16, 5, 6)).macs == 4 * tokens * width**2 + 2 * tokens**2 * width


# Parts


def test_parts_of_a_backbone():
    cost = count(on_meta(build, arch='cpolynext_t'), (3, 64, 96))
    assert cost.parts['stem'].macs == 7 * 7 * 3 * 48 * 16 * 24
    assert cost.parts['stem'].parameters == 7 * 7 * 3 * 48
    stages = [cost.parts[f'stages.{i}'].macs for i in range(4)]
    assert cost.macs == cost.parts['stem'].macs + sum(stages)
    assert cost.parts['stages'].macs == sum(stages)
    assert cost.parts['out_norms.0'].macs in (None, 0)
    mlp = cost.parts['stages.0.cells.0.stacks.0.mlp']
    assert mlp.macs == 16 * 24 * (48 * 96 + 48 * 48)


def test_the_table():
    cost = count(on_meta(build, arch='cpolynext_t'), (3, 64, 96))
    rows = [line.split() for line in table(cost).splitlines()]
    assert [row[0] for row in rows] == ['module', 'stem', 'stages', 'out_norms', 'total']
    assert rows[1][1:] == ['0.007', '0.003', f'{cost.parts["stem"].macs / cost.macs:.1%}']
    assert rows[-1][1:] == [f'{cost.parameters / 1e6:.3f}', f'{cost.macs / 1e9:.3f}', '100.0%']
    deeper = table(cost, depth=2)
    assert 'stages.3 ' in deeper and 'stages.3.cells' not in deeper


def test_regions_of_a_detector_in_two_stages():
    """1000 boxes and 100 masks, by mmdet's test_cfg; their heads' sizes are in the config."""
    cost = count_config(config('mask_rcnn_cpolynext_t_coco_1x'), (64, 96))
    boxes = 7 * 7 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    masks = 14 * 14 * (4 * 9 * 256 * 256 + 4 * 256 * 256 + 4 * 256 * 80)
    assert cost.parts['roi_head.bbox_head'].macs == 1000 * boxes
    assert cost.parts['roi_head.mask_head'].macs == 100 * masks
    whole = ('backbone', 'neck', 'rpn_head', 'roi_head')
    assert sum(cost.parts[part].macs for part in whole) == cost.macs


def test_a_cascade_runs_every_head():
    cost = count_config(config('cascade_mask_rcnn_cpolynext_s_coco_3x'), (64, 96))
    heads = [cost.parts[f'roi_head.bbox_head.{i}'].macs for i in range(3)]
    assert heads[0] == heads[1] == heads[2] > 0
    assert cost.parts['roi_head.bbox_head'].macs == sum(heads)


def test_a_detector_in_one_stage():
    cost = count_config(config('retinanet_cpolynext_t_coco_1x'), (128, 128))
    positions = sum(n * n for n in (16, 8, 4, 2, 1))
    head = 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)
    assert cost.parts['bbox_head'].macs == positions * head


# Configs


def test_default_shapes_and_channels_of_the_image():
    backbone = Config(dict(model=dict(type='PolyNeXt', arch='cpolynext_t', in_channels=4)))
    cost = count_config(backbone)
    assert cost.shape == (4, 224, 224)
    detector = config('retinanet_cpolynext_t_coco_1x')
    assert count_config(detector).shape == (3, 800, 1280)


@MODELS.register_module()
class ValueDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.layer(x) * x.sum().item()


def test_a_model_that_needs_values_is_counted_on_the_cpu():
    cfg = Config(dict(model=dict(type='ValueDependent')))
    with pytest.raises(
        NeedsValuesError, match='ValueDependent does not run on the meta device.*to cpu'
    ):
        count_config(cfg, (4, 5))
    assert count_config(cfg, (4, 5), 'cpu') == Cost(
        (3, 4, 5), 8, 120, count_config(cfg, (4, 5), 'cpu').parts
    )


def test_heads_that_are_not_known_are_not_counted_wrongly():
    cfg = config('mask_rcnn_cpolynext_t_coco_1x')
    cfg.model.roi_head.type = 'PISARoIHead'
    with pytest.raises(ValueError, match='PISARoIHead.*StandardRoIHead or CascadeRoIHead are'):
        count_config(cfg, (64, 64))


# The tool


def test_the_tool_prints_what_was_counted(capsys):
    path = ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py'
    cost = count_config(Config.fromfile(path), (64, 64))
    assert not call_tool(
        'get_flops',
        path,
        *'--shape 64 --by-module 2 --cfg-options model.auxiliary_head=None'.split(),
    )
    printed = capsys.readouterr().out
    assert 'decode_head.bottleneck ' in printed and 'auxiliary_head' not in printed
    assert f'{path}, inference on one image of 64x64' in printed
    head = cost.parts['auxiliary_head'].parameters
    for name, value in (
        ('parameters', f'{(cost.parameters - head) / 1e6:.2f} M'),
        ('MACs', f'{cost.macs / 1e9:.2f} G'),
        ('FLOPs', f'{2 * cost.macs / 1e9:.2f} G'),
    ):
        line = next(line for line in printed.splitlines() if line.startswith(f'{name} '))
        assert ' '.join(line.split()).startswith(f'{name} {value}')


@pytest.fixture
def needs_values(tmp_path):
    path = tmp_path / 'needs_values.py'
    path.write_text("model = dict(type='ValueDependent')")
    return path


def test_the_tool_turns_to_the_cpu_where_values_are_needed(needs_values, capsys):
    assert not call_tool('get_flops', needs_values, *'--shape 4 5'.split())
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith('counting on the CPU, which takes longer: ValueDependent does not run')
    assert f'{needs_values}, inference on one image of 4x5' in out


def test_a_device_that_was_chosen_stays(needs_values, capsys):
    error = call_tool('get_flops', needs_values, *'--shape 4 --device meta'.split())
    assert f'{needs_values}: ValueDependent does not run on the meta device' in error
    assert error.endswith(': set the device to cpu')
    assert not call_tool('get_flops', needs_values, *'--shape 4 --device cpu'.split())
    assert 'counting on the CPU' not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'dino_cpolynext_s_coco_12e',
        'mask2former_cpolynext_s_coco_50e',
        'mask2former_cpolynext_s_ade20k',
    ],
)
def test_the_tool_counts_the_configs_that_need_values(name, capsys):
    path = ROOT / 'configs' / f'{name}.py'
    assert not call_tool('get_flops', path, '--shape', 256)  # DINO chooses 900 of its positions
    out, err = capsys.readouterr()
    model = config(name).model.type
    assert f'counting on the CPU, which takes longer: {model} does not run on the meta' in err
    assert f'{path}, inference on one image of 256x256' in out


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (('absent.py',), 'there is no config absent.py'),
        (('absent.py', '--shape', '1', '2', '3'), '--shape takes H and W, or one number'),
        (('absent.py', '--shape', '0'), '--shape takes H and W, or one number'),
    ],
)
def test_wrong_arguments(arguments, problem, capsys):
    error = call_tool('get_flops', *arguments)
    assert problem in f'{error} {capsys.readouterr().err}'
