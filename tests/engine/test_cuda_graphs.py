"""CUDAGraphHook with a stand-in for the capture, which needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polynext_mm.engine import cuda_graphs
from tests.engine.runs import config, train
from tests.helpers.files import ROOT
from tests.helpers.networks import build
from tests.helpers.programs import python

SIZE = torch.Size((2, 3, 64, 64))


@pytest.fixture
def replayed(monkeypatch):
    """Let a capture be possible here; return the shapes captured and the number of replays."""
    shapes, replays = [], []

    def capture(module, sample_args):
        assert not torch.is_autocast_cache_enabled()
        assert not module._forward_hooks and not module._forward_pre_hooks
        (static,) = sample_args
        shapes.append(static.shape)

        def replay(x):
            replays.append(static.copy_(x))
            return module(static)

        return replay

    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', capture)
    monkeypatch.setattr(cuda_graphs, '_device', lambda backbone: 'cuda')
    return SimpleNamespace(shapes=shapes, replays=replays)


def runner_of(backbone, counts=1, wrap=lambda model: model):
    model = nn.Module()
    model.backbone = backbone
    wrapper = SimpleNamespace(_accumulative_counts=counts)
    return SimpleNamespace(model=wrap(model), optim_wrapper=wrapper)


@pytest.mark.heavy
def test_a_training_replays_the_first_shape(replayed, tmp_path):
    """With validation between the steps, and as it would have gone without."""
    weights = []
    for hooks in ([HOOKS.build(dict(type='CUDAGraphHook'))], []):
        cfg = config('segmentation', tmp_path / str(len(hooks)), iters=4)
        cfg.optim_wrapper.dtype = 'bfloat16'
        runner = train(cfg, hooks=hooks)
        weights.append(runner.model.state_dict())
        assert replayed.shapes == [(2, 3, 64, 64)] and len(replayed.replays) == 4
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_other_shapes_and_evaluation_are_launched(replayed):
    backbone = build()
    runner, hook = runner_of(backbone), HOOKS.build(dict(type='CUDAGraphHook'))
    hook.before_train(runner)
    x = torch.randn(SIZE)
    replayed_features = backbone(x)
    for images, prepare in (
        (x[:, :, :32], backbone.train),
        (x, backbone.eval),
        (x, lambda: backbone.train().requires_grad_(False)),
    ):
        prepare()
        with torch.set_grad_enabled(backbone.training and backbone.stem.weight.requires_grad):
            backbone(images)
    assert replayed.shapes == [SIZE] and len(replayed.replays) == 1
    hook.after_train(runner)
    assert 'forward' not in vars(backbone)
    for a, b in zip(backbone(x), replayed_features):
        assert torch.equal(a, b)


def test_a_second_call_within_an_iteration_is_launched(replayed):
    """Its replay would overwrite what the backward pass of the first call needs."""
    model = nn.Module()
    model.detector = nn.ModuleDict(dict(backbone=build()))  # as of mmdet's trackers
    model.teacher = build().requires_grad_(False)
    runner = SimpleNamespace(model=model, optim_wrapper=SimpleNamespace())
    hook = HOOKS.build(dict(type='CUDAGraphHook'))
    hook.before_train(runner)
    assert 'forward' not in vars(model.teacher)
    for step in (1, 2):
        hook.before_train_iter(runner, batch_idx=step)
        for _ in range(2):
            model.detector['backbone'](torch.randn(SIZE))
        assert len(replayed.replays) == step


@pytest.mark.parametrize(
    ('settings', 'run', 'reason'),
    [
        (dict(with_cp=True), {}, 'with_cp=True'),
        (dict(norm='bn'), {}, "norm='bn'"),
        ({}, dict(counts=2), 'accumulative_counts'),
        (
            {},
            dict(wrap=nn.DataParallel),
            'in DataParallel, and only DistributedDataParallel',
        ),
    ],
    ids=str,
)
def test_what_a_graph_cannot_take(settings, run, reason, replayed):
    with pytest.raises(ValueError, match=f'{reason}.*or remove the hook from custom_hooks'):
        HOOKS.build(dict(type='CUDAGraphHook')).before_train(runner_of(build(**settings), **run))


@pytest.mark.slow
def test_under_distributed_data_parallel():
    """Captured before it is wrapped, and trained as without graphs, in both processes."""
    printed = python(
        *('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'),
        ROOT / 'tests' / 'engine' / 'graphs_in_every_process.py',
        'cpu',
        PYTHONPATH=str(ROOT),
    )
    assert all(f'RANK {rank} agrees' in printed for rank in range(2)), printed


def test_images_of_unknown_shape_are_refused_in_several_processes(replayed, monkeypatch):
    """Before a shape is known there is nothing to capture."""
    backbone = build()
    runner = runner_of(backbone)
    hook = HOOKS.build(dict(type='CUDAGraphHook'))
    hook.before_train(runner)
    model = runner.model
    model.data_preprocessor = lambda data, training: data
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    runner.model = wrapped
    with pytest.raises(ValueError, match=r"the data_preprocessor of Module returns no 'inputs'"):
        hook.before_train_iter(runner, batch_idx=0, data_batch=dict(inputs=[torch.ones(3, 4, 4)]))


def test_without_a_gpu_or_a_polynext():
    hook = HOOKS.build(dict(type='CUDAGraphHook'))
    with pytest.raises(ValueError, match='on cpu, and CUDA graphs need a GPU'):
        hook.before_train(runner_of(build()))
    with pytest.raises(ValueError, match='no PolyNeXt trains in Module'):
        hook.before_train(runner_of(nn.Linear(1, 1)))


def test_a_loss_scale_on_the_device_stays_in_its_place():
    """A graph reads the memory that it was captured with."""
    backbone = build(grad_clip_norm=5.0)
    backbone.set_loss_scale(torch.tensor(8.0))
    place = backbone.loss_scale
    backbone.set_loss_scale(torch.tensor(4.0))
    assert backbone.loss_scale is place and place == 4
    backbone.set_loss_scale(1.0)
    assert backbone.loss_scale == 1.0
