"""Every parameter of a real model is in the group that the recipe has it in."""

import collections
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from polynext_mm.compat.torch_features import has_fused_optimizers
from polynext_mm.engine import PolyNeXtOptimWrapperConstructor
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.networks import build

LR, DECAY = 1e-4, 0.05


FUSED = pytest.mark.skipif(
    not has_fused_optimizers('cpu'), reason='fused optimizers on CPUs: torch 2.4'
)


@pytest.fixture(scope='module', params=['cpolynext_t', 'apolynext_t'])
def model(request):
    cfg = Config.fromfile(ROOT / 'configs' / f'upernet_{request.param}_ade20k.py')
    cfg.merge_from_dict(
        {
            'model.decode_head.channels': 8,
            'model.auxiliary_head.channels': 8,
            'model.backbone.init_cfg': None,
        }
    )
    return build_model(cfg)


def grouped(model, **paramwise) -> dict:
    """Return (lr, weight decay) of every parameter by name, from the optimizer."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            constructor='PolyNeXtOptimWrapperConstructor',
            paramwise_cfg=paramwise,
            optimizer=dict(type='AdamW', lr=LR, betas=(0.9, 0.999), weight_decay=DECAY),
        ),
    )
    groups = wrapper.optimizer.param_groups
    settings = {
        id(param): (group['lr'], group['weight_decay'])
        for group in groups
        for param in group['params']
    }
    assert sum(len(group['params']) for group in groups) == len(settings), (
        'a parameter in two groups'
    )
    assert len(set(settings.values())) == len(groups), 'two groups of one setting'
    return {name: settings[id(param)] for name, param in model.named_parameters()}


def kind(name: str) -> str:
    """Return the recipe's term for a parameter, from its name."""
    part, *rest = name.split('.')
    if part != 'backbone':
        return 'head norm' if 'bn' in rest else 'head'
    if rest[0] == 'out_norms':
        return 'output norm'
    if rest[-1] in ('scale0', 'scale1', 'scale_logit', 'gate_logits'):
        return 'scale'
    return 'norm' if rest[-2] == 'norm' else 'weight'


def test_the_released_groups_are_the_default(model):
    expected = {
        'weight': (LR, DECAY),
        'norm': (LR, DECAY),
        'scale': (LR, 0),
        'output norm': (LR, 0),
        'head': (10 * LR, DECAY),
        'head norm': (10 * LR, DECAY),
    }
    groups = grouped(model, head_lr_mult=10.0)
    assert {kind(name) for name in groups} == set(expected)
    for name, setting in groups.items():
        assert setting == pytest.approx(expected[kind(name)]), name
    assert groups == grouped(model, head_lr_mult=10.0, no_decay='released')


def test_the_papers_groups(model):
    expected = {
        'weight': DECAY,
        'norm': 0,
        'scale': 0,
        'output norm': 0,
        'head': DECAY,
        'head norm': 0,
    }
    for name, (lr, decay) in grouped(model, no_decay='paper').items():
        assert decay == expected[kind(name)], name
        assert lr == LR


@pytest.mark.parametrize('no_decay', ['released', 'paper'])
def test_embeddings_decay_unless_exempt(no_decay):
    network = nn.Module()
    network.backbone = build()
    others = grouped(network, no_decay=no_decay)
    network.queries = nn.Embedding(3, 4)
    for decays in (True, False):
        groups = grouped(network, no_decay=no_decay, embedding_decay=decays)
        assert groups.pop('queries.weight') == (LR, DECAY if decays else 0)
        assert groups == others
    assert grouped(network)['queries.weight'] == (LR, DECAY)


def test_layer_wise_decay(model):
    """The factor .9 applies once per cell between a parameter and the output."""
    depths = model.backbone.arch.depths
    first = [sum(depths[:stage]) for stage in range(4)]
    for name, (lr, _) in grouped(model, head_lr_mult=2.0, layer_decay_rate=0.9).items():
        parts = name.split('.')
        if parts[0] != 'backbone':
            expected = 2 * LR
        elif parts[1] == 'out_norms':
            expected = LR
        elif parts[1] == 'stem':
            expected = LR * 0.9 ** (sum(depths) + 1)
        else:
            cell = first[int(parts[2])] + (int(parts[4]) if parts[3] == 'cells' else 0)
            expected = LR * 0.9 ** (sum(depths) - cell)
        assert lr == pytest.approx(expected), name


class Calls(TorchDispatchMode):
    """Count calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


def built_from(cfg, model, **optimizer):
    return build_optim_wrapper(
        model, cfg.optim_wrapper | {'optimizer': cfg.optim_wrapper.optimizer | optimizer}
    )


def take_steps(model, wrapper, count):
    for step in range(count):
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + i)
            param.grad = torch.randn(param.shape, generator=generator)
        wrapper.step()


@FUSED
@pytest.mark.parametrize('name', ['upernet_cpolynext_t_ade20k', 'mask_rcnn_cpolynext_t_coco_1x'])
def test_a_step_of_the_recipes_is_a_few_calls(name):
    """However many tensors there are: clipping, and one call for each of the groups."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
    model = nn.Module()
    model.backbone = build()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    take_steps(model, wrapper, 1)  # makes the state
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with Calls() as calls:
        wrapper.step()
    assert calls.counts['aten::_fused_adamw_'] == len(wrapper.optimizer.param_groups)
    assert calls.counts['aten::_foreach_mul_'] == calls.counts['aten::_foreach_norm'] == 1
    assert sum(calls.counts.values()) < 30 < len(list(model.parameters()))


@FUSED
@pytest.mark.parametrize(('before', 'after'), [(None, True), (True, None), (True, True)])
def test_resuming_keeps_the_implementation_of_the_config(before, after):
    """A checkpoint from before fused=True goes on fused, and with the same numbers."""
    cfg = Config.fromfile(ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py')
    cfg.optim_wrapper.dtype = 'float32'
    model, other = nn.Module(), nn.Module()
    model.backbone, other.backbone = build(), build()
    wrapper = built_from(cfg, model, fused=before, lr=1e-2)
    take_steps(model, wrapper, 2)
    other.load_state_dict(model.state_dict())
    resumed = built_from(cfg, other, fused=after, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert all(group['fused'] is after for group in resumed.optimizer.param_groups)
    assert resumed.optimizer.param_groups[0]['lr'] == 1e-2
    for one, run in ((model, wrapper), (other, resumed)):
        take_steps(one, run, 2)
    for (name, value), expected in zip(other.named_parameters(), model.parameters()):
        torch.testing.assert_close(value, expected, msg=name)


def test_frozen_parameters_are_in_no_group():
    network = nn.Module()
    network.backbone = build(frozen_stages=2)
    wrapper = build_optim_wrapper(
        network,
        dict(
            type='OptimWrapper',
            constructor='PolyNeXtOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        ),
    )
    frozen = {id(param) for param in network.parameters() if not param.requires_grad}
    assert frozen
    assert frozen.isdisjoint(
        id(p) for group in wrapper.optimizer.param_groups for p in group['params']
    )


def test_the_table_in_the_log(model, monkeypatch):
    logged = []
    monkeypatch.setattr('polynext_mm.engine.optim.print_log', lambda text, **_: logged.append(text))
    grouped(model, head_lr_mult=10.0)
    lines = logged[0].splitlines()
    assert lines[0] == 'Parameter groups:'
    assert lines[1].split()[:4] == ['lr', 'decay', 'tensors', 'parameters']
    rows = [line.split() for line in lines[2:5]]
    assert {(float(row[0]), float(row[1])) for row in rows} == {
        (LR, DECAY),
        (LR, 0),
        (10 * LR, DECAY),
    }
    assert sum(int(row[2]) for row in rows) == len(list(model.parameters()))
    assert sum(int(row[3].replace(',', '')) for row in rows) == sum(
        param.numel() for param in model.parameters()
    )


@pytest.mark.parametrize(
    ('options', 'valid'),
    [
        (dict(no_decay='all'), "'released', 'paper'"),
        (dict(head_lr_mult=0), 'head_lr_mult must be positive'),
        (dict(layer_decay_rate=1.2), r'within \(0, 1\]'),
        (dict(layer_decay_rate=0), r'within \(0, 1\]'),
        (
            dict(custom_keys={}),
            'unknown custom_keys; the options are no_decay, embedding_decay, head_lr_mult and '
            'layer_d',
        ),
        (dict(embedding_decay=0.0), 'embedding_decay must be True or False, got 0.0'),
        (dict(norm_decay_mult=0.0), 'unknown norm_decay_mult'),
    ],
    ids=str,
)
def test_wrong_options(options, valid):
    with pytest.raises(ValueError, match=valid):
        PolyNeXtOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=0.1)), options)


def test_a_model_of_another_backbone():
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 3, 1)
    constructor = PolyNeXtOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=0.1)))
    with pytest.raises(ValueError, match='with a PolyNeXt or a MetaFormer, and Module has none'):
        constructor(model)


def test_the_callers_config_stays_as_it_is():
    cfg = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY))
    model = nn.Module()
    model.backbone = build()
    PolyNeXtOptimWrapperConstructor(cfg, {})(model)
    assert cfg == dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY))


def test_backbones_are_found_wherever_they_are():
    """As in mmdet's trackers and SoftTeacher, and as img_backbone of mmdet3d."""
    plain = nn.Module()
    plain.backbone, plain.head = build(), nn.Linear(3, 3)
    options = dict(head_lr_mult=10.0, layer_decay_rate=0.5)
    expected = grouped(plain, **options)
    for place in ('detector.backbone', 'student.backbone', 'img_backbone'):
        model = nn.Module()
        *outer, name = place.split('.')
        holder = nn.Module()
        model.add_module(outer[0], holder) if outer else None
        (holder if outer else model).add_module(name, build())
        model.head = nn.Linear(3, 3)
        groups = grouped(model, **options)
        assert {key.replace(place, 'backbone'): value for key, value in groups.items()} == expected
    several = nn.Module()
    several.student, several.teacher, several.head = build(), build(), nn.Linear(3, 3)
    several.teacher.requires_grad_(False)
    several.other = build()
    for param in several.teacher.parameters():
        assert not param.requires_grad
    settings = {
        name: (group['lr'], group['weight_decay'])
        for group in PolyNeXtOptimWrapperConstructor(
            dict(optimizer=dict(type='SGD', lr=LR)), options
        ).groups(several, LR, DECAY)
        for name in group['names']
    }
    assert not any(name.startswith('teacher.') for name in settings)
    for place in ('student.', 'other.'):
        assert {
            'backbone.' + name.removeprefix(place): value
            for name, value in settings.items()
            if name.startswith(place)
        } == {name: value for name, value in expected.items() if name.startswith('backbone.')}
    assert grouped(build(), **options) == {
        name.removeprefix('backbone.'): value
        for name, value in expected.items()
        if name.startswith('backbone.')
    }
