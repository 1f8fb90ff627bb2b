"""Outputs of the backbone that no head uses are found before the first optimizer step."""

import copy
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from polynext_mm.engine import TrainingCheckHook
from tests.helpers.configs import as_arguments, tiny_options
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.networks import build
from tests.helpers.programs import free_port, run
from tests.helpers.samples import ade20k_scenes

PSP_ON_THE_LAST_STAGE = f"""
_base_ = '{CONFIG}'
model = dict(
    decode_head=dict(
        _delete_=True, type='PSPHead', in_channels=288, in_index=3, channels=16, num_classes=150,
        norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=None)
val_cfg, val_dataloader, val_evaluator = None, None, None
"""


@pytest.fixture
def options(tmp_path):
    """Write a config with a PSPHead on stage 3 alone; return it and options for a tiny run."""
    path = tmp_path / 'psp.py'
    path.write_text(PSP_ON_THE_LAST_STAGE)
    kept = {
        key: value
        for key, value in tiny_options(ade20k_scenes(), iters=2).items()
        if not key.startswith(('val_', 'model.auxiliary_head', 'train_cfg.val'))
    }
    return path, kept


@pytest.mark.slow
def test_several_processes_stop_before_the_first_step(options, tmp_path):
    path, settings = options
    printed = run(
        ROOT / 'tools' / 'dist_train.sh',
        path,
        2,
        '--work-dir',
        tmp_path / 'work',
        *as_arguments(settings),
        PYTHON=sys.executable,
        PORT=str(free_port()),
        cwd=tmp_path,
        succeeds=False,
    )
    assert 'no neck or head uses the outputs of stages [0, 1, 2]' in printed
    assert 'out_indices=(3,)' in printed and 'out_norms.0.weight among them' in printed
    assert (
        'find_unused_parameters=True' not in printed
    )  # which torch advises in the second iteration
    assert 'iteration 1/' not in printed


@pytest.mark.heavy
def test_one_process_is_warned_and_trains(options, tmp_path):
    path, settings = options
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(settings)
    cfg.work_dir = str(tmp_path / 'work')
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    (log,) = (tmp_path / 'work').glob('*/*.log')
    assert (
        log.read_text().count('WARNING - no neck or head uses the outputs of stages [0, 1, 2]') == 1
    )


# In one process, with and without DDP


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def warnings(monkeypatch):
    """Collect what the hook logs."""
    logged = []
    monkeypatch.setattr(
        'polynext_mm.engine.checks.training.print_log', lambda text, **_: logged.append(text)
    )
    return logged


def train_two_steps(model: nn.Module, uses: tuple[int, ...]) -> None:
    """Train with TrainingCheckHook on a loss that uses some of the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = SimpleNamespace(
        model=model,
        optim_wrapper=OptimWrapper(optimizer),
        train_dataloader=DataLoader(range(4), batch_size=2),
        max_iters=2,
        world_size=1,
    )
    TrainingCheckHook().before_train(runner)
    for _ in range(2):
        outs = model(torch.randn(2, 3, 64, 64))
        runner.optim_wrapper.update_params(sum(outs[i].square().mean() for i in uses))


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize(
    ('settings', 'uses', 'unused', 'used'),
    [
        (dict(), (3,), '[0, 1, 2]', '(3,)'),
        (dict(), (0, 2), '[1, 3]', '(0, 2)'),
        (dict(out_indices=(1, 2, 3)), (0,), '[2, 3]', '(1,)'),
        (dict(out_norm=False), (0,), '[1, 2, 3]', '(0,)'),
        (dict(frozen_stages=4), (1,), '[0, 2, 3]', '(1,)'),
    ],
    ids=str,
)
def test_ddp_is_stopped(settings, uses, unused, used):
    model = build(**settings)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(f'stages {unused} of the')) as caught:
        train_two_steps(DistributedDataParallel(model), uses)
    assert f'out_indices={used}' in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize(
    ('settings', 'uses'),
    [
        (dict(), (0, 1, 2, 3)),
        (dict(out_indices=(1, 3), frozen_stages=1, drop_path_rate=0.9), (0, 1)),
        # without output norms, early stages get their gradient through later ones
        (dict(out_norm=False), (3,)),
    ],
    ids=str,
)
def test_ddp_trains_where_all_is_used(settings, uses, warnings):
    train_two_steps(DistributedDataParallel(build(**settings)), uses)
    assert not warnings


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('tolerates', ['find_unused_parameters', 'static_graph'])
def test_ddp_that_tolerates_unused_outputs_warns(tolerates, warnings):
    train_two_steps(DistributedDataParallel(build(), **{tolerates: True}), (3,))
    (warning,) = warnings
    assert 'stages [0, 1, 2] of the backbone' in warning and 'out_indices=(3,)' in warning


def test_heads_trained_on_a_backbone_without_gradients_are_no_concern(warnings):
    model = build(out_norm=False)
    head = nn.Conv2d(24, 1, 1)
    wrapped = nn.Module()
    wrapped.backbone, wrapped.head = model, head
    wrapped.forward = lambda x: [head(model(x)[-1].detach())]
    train_two_steps(wrapped, (0,))
    assert not warnings
