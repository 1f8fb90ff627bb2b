"""A resumed run equals the uninterrupted one, bit for bit."""

import collections
import datetime
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper
from mmengine.runner import Runner

from polynext_mm.engine.checkpoints import resuming
from polynext_mm.engine.random_numbers import random_state, set_random_state
from polynext_mm.weights import CheckpointError
from tests.engine.runs import config, differences, saved, train
from tests.marks import some_slow

FLOAT16 = {
    'optim_wrapper.type': 'AutocastOptimWrapper',
    'optim_wrapper.dtype': 'float16',
    'optim_wrapper.loss_scale': 2.0**18,  # which the first step finds too large, and is skipped
}
NO_VALIDATION = {'train_cfg.val_interval': 100, 'default_hooks.checkpoint.save_best': None}
# task, by epoch, workers, settings, further hooks
KINDS = {
    'segmentation': ('segmentation', False, 0, {}, []),
    'segmentation by epoch': ('segmentation', True, 2, {}, []),
    'detection': ('detection', False, 2, {}, []),
    'detection by epoch': ('detection', True, 0, {}, []),
    'loss scaling': ('segmentation', False, 0, FLOAT16, []),
    'average': ('segmentation', False, 0, {}, [dict(type='EMAHook', momentum=0.1)]),
}


def settings(task, by_epoch, workers):
    return dict(
        task=task,
        by_epoch=by_epoch,
        iters=3 if by_epoch else 6,
        **{
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': workers > 0,
            'val_dataloader.num_workers': workers,
            'val_dataloader.persistent_workers': workers > 0,
        },
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    'kind', some_slow(KINDS, ['detection', 'detection by epoch', 'loss scaling', 'average'])
)
def test_every_checkpoint_leads_to_the_same_end(tmp_path, kind):
    *options, more, hooks = KINDS[kind]

    def cfg(work_dir):
        made = config(work_dir=work_dir, **settings(*options), **more)
        made.custom_hooks += hooks
        return made

    whole = train(cfg(tmp_path / 'whole'))
    last, *earlier = (
        ('epoch_3', 'epoch_2', 'epoch_1') if options[1] else ('iter_6', 'iter_4', 'iter_2')
    )
    expected = saved(tmp_path / 'whole' / f'{last}.pth')
    assert expected['meta']['iter'] == 6
    assert ('loss_scaler' in expected['optimizer']) == (kind == 'loss scaling')
    if kind == 'loss scaling':
        assert expected['optimizer']['loss_scaler']['scale'] == 2.0**17  # halved once
        assert {int(state['step']) for state in expected['optimizer']['state'].values()} == {5}
    assert ('ema_state_dict' in expected) == (kind == 'average')
    for name in earlier:
        work_dir = tmp_path / name
        work_dir.mkdir()
        shutil.copy(tmp_path / 'whole' / f'{name}.pth', work_dir)
        resumed = train(cfg(work_dir), resume=True)
        assert differences(saved(work_dir / f'{last}.pth'), expected) == []
        assert resumed.message_hub.get_info('best_score') == whole.message_hub.get_info(
            'best_score'
        )


@pytest.mark.heavy
def test_workers_do_not_matter(tmp_path):
    for workers in (0, 2):
        train(config(work_dir=tmp_path / str(workers), **settings('segmentation', False, workers)))
    none, two = (saved(tmp_path / name / 'iter_6.pth') for name in ('0', '2'))
    assert differences(none, two) == []


@pytest.mark.slow
def test_without_a_seed_the_drawn_one_goes_on(tmp_path):
    options = dict(settings('segmentation', False, 0), **{'randomness.seed': None})
    train(config(work_dir=tmp_path / 'whole', **options))
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_2.pth', tmp_path / 'resumed')
    train(config(work_dir=tmp_path / 'resumed', **options), resume=True)
    whole, resumed = (saved(tmp_path / name / 'iter_6.pth') for name in ('whole', 'resumed'))
    assert differences(whole, resumed) == []


@pytest.mark.heavy
def test_a_checkpoint_of_mmengine_alone_goes_on_with_a_warning(tmp_path):
    options = settings('segmentation', False, 0)
    train(config(work_dir=tmp_path, **options))
    for path in tmp_path.glob('iter_*.pth'):
        content = saved(path)
        del content['polynext_resume']
        torch.save(content, path)
    (tmp_path / 'iter_6.pth').unlink()
    runner = train(config(work_dir=tmp_path, **options), resume=True)
    assert runner.iter == 6
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'holds no random states' in log


@pytest.mark.heavy
def test_another_checkpoint_hook_is_refused(tmp_path):
    options = {'default_hooks.checkpoint.type': 'CheckpointHook'}
    with pytest.raises(ValueError, match='AtomicCheckpointHook'):
        train(config('segmentation', tmp_path, **options))


@pytest.mark.skipif(not hasattr(torch, 'accelerator'), reason='torch.accelerator is of 2.6')
@pytest.mark.parametrize('device', ['cuda', 'xpu', 'mps'])
def test_the_generator_of_any_accelerator_is_kept(device, monkeypatch):
    generator = torch.Generator()  # in the place of the device's
    module = SimpleNamespace(
        get_rng_state=generator.get_state,
        set_rng_state=generator.set_state,
    )
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(device))
    monkeypatch.setattr(torch, 'get_device_module', lambda name: {device: module}[name])
    state = random_state()
    drawn = torch.rand(3, generator=generator)
    set_random_state(state)
    assert torch.equal(torch.rand(3, generator=generator), drawn)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('hpu'))
    set_random_state(state)  # taken up on another machine


# What a run writes it can resume from


class Keeps(Hook):
    """Saves something of its own."""

    def __init__(self, value):
        self.value, self.found = value, None

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['of_a_user'] = dict(inner=[self.value])

    def after_load_checkpoint(self, runner, checkpoint):
        self.found = checkpoint['of_a_user']['inner'][0]


@pytest.mark.heavy
def test_what_users_add_is_read_back(tmp_path, monkeypatch):
    """A path, a date, dicts with more to them; functions of schedules and of statistics."""
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    HistoryBuffer.register_statistics(weighted_mean)
    values = (
        Path('a/b'),
        datetime.datetime(2020, 1, 1),
        collections.deque([1, 2]),
        collections.defaultdict(int, a=1),
        ConfigDict(a=dict(b=1)),
    )
    schedule = [dict(type='OneCycleLR', eta_max=1e-3, total_steps=4, by_epoch=False)]

    def cfg(iters):
        made = config('segmentation', tmp_path, iters=iters)
        made.param_scheduler = schedule
        made.train_dataloader.dataset.metainfo.source = dict(year=2020)
        return made

    train(cfg(2), hooks=[Keeps(values)])
    hook = Keeps(values)
    assert train(cfg(4), resume=True, hooks=[hook]).iter == 4
    assert hook.found == (values[0], values[1], [1, 2], dict(a=1), dict(a=dict(b=1)))
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'metainfo from the resumed checkpoint is different' not in log


def weighted_mean(self, window_size):
    return self.mean(window_size)


class Custom:
    """Somebody's own class."""


@pytest.mark.heavy
def test_what_could_not_be_resumed_from_stops_the_run_at_its_first_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r'of_a_user.inner\[0\] \(a Custom\) cannot be read'):
        train(config('segmentation', tmp_path, iters=6), hooks=[Keeps(Custom())])
    assert [path.name for path in tmp_path.glob('iter_*.pth')] == ['iter_2.pth']


# Other settings than the checkpoint's


def schedule(end):
    return [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
        dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=2, end=end),
    ]


@pytest.mark.heavy
def test_a_longer_schedule_is_followed(tmp_path):
    """From where it would be, had it been so long from the beginning."""

    def run(work_dir, iters, end, resume=False, **more):
        cfg = config('segmentation', work_dir, iters=iters, **NO_VALIDATION, **more)
        cfg.param_scheduler = schedule(end)
        found = {}

        class Look(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                found[runner.iter] = runner.optim_wrapper.param_groups[0]['lr']

        train(cfg, resume=resume, hooks=[Look()])
        return found, max(work_dir.glob('*/*.log')).read_text()

    expected, _ = run(tmp_path / 'whole', 8, 8)
    first, _ = run(tmp_path / 'longer', 4, 4)
    later, log = run(tmp_path / 'longer', 8, 8, resume=True)
    assert sorted(later) == [4, 5, 6, 7]
    assert later == pytest.approx({step: expected[step] for step in later})
    assert max(later.values()) > 0
    assert 'max_iters 4 -> 8; schedule: end of PolyLR 4 -> 8' in log
    (tmp_path / 'lower').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_4.pth', tmp_path / 'lower')
    lower, log = run(
        tmp_path / 'lower',
        8,
        8,
        resume=True,
        **{
            'optim_wrapper.optimizer.lr': 1e-5,
            'optim_wrapper.optimizer.weight_decay': 0.5,
            'train_dataloader.dataset.indices': 3,
        },
    )
    ratio = {step: lower[step] / expected[step] for step in lower if expected[step]}
    assert len(set(map(lambda value: round(value, 9), ratio.values()))) == 1
    assert 'samples 4 -> 3; lr ' in log and '-> 1e-05' in log and '; weight_decay ' in log


@pytest.mark.heavy
def test_fewer_iterations_than_are_done_are_told(tmp_path):
    train(config('segmentation', tmp_path, iters=4, **NO_VALIDATION))
    train(config('segmentation', tmp_path, iters=2, **NO_VALIDATION), resume=True)
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'max_iters is 2, and the checkpoint' in log and 'nothing is left to train' in log


def test_by_epoch_the_schedule_of_epochs_is_replayed():
    model = torch.nn.Linear(2, 2)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    by_epoch = MultiStepLR(wrapper, milestones=[1, 2], gamma=0.1)
    by_iter = LinearLR(wrapper, start_factor=0.5, by_epoch=False, begin=0, end=4)
    resuming._step_together({by_epoch: 2, by_iter: 6})
    assert (by_epoch.last_step, by_iter._global_step) == (2, 6)
    assert wrapper.param_groups[0]['lr'] == pytest.approx(0.01)


@pytest.mark.heavy
@pytest.mark.parametrize('task', ['test', 'train'])
def test_classes_in_another_order_than_the_checkpoints_are_told(task, tmp_path):
    train(config('segmentation', tmp_path / 'work', iters=2))
    cfg = config('segmentation', tmp_path / 'again', iters=4)
    classes = tuple(cfg.train_dataloader.dataset.metainfo.classes)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo.classes = classes[::-1]
    cfg.load_from, cfg.resume = str(tmp_path / 'work' / 'iter_2.pth'), task == 'train'
    runner = Runner.from_cfg(cfg)
    with pytest.raises(CheckpointError) as caught:
        getattr(runner, task)()
    assert f'set metainfo.classes to {classes}' in str(caught.value)
