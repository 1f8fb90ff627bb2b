"""A resumed run equals the uninterrupted one, bit for bit."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import config, differences, saved, train

from marks import some_slow
from polynext_mm.engine.reproducibility import random_state, set_random_state

pytestmark = pytest.mark.usefixtures('quick_configs')

FLOAT16 = {
    'optim_wrapper.type': 'AutocastOptimWrapper',
    'optim_wrapper.dtype': 'float16',
    'optim_wrapper.loss_scale': 2.0**17,  # which the first step finds too large, and is skipped
}
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


@pytest.mark.parametrize(
    'kind', some_slow(KINDS, ['detection', 'detection by epoch', 'loss scaling'])
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
        assert expected['optimizer']['loss_scaler']['scale'] == 2.0**16
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


def test_another_checkpoint_hook_is_refused(tmp_path):
    options = {'default_hooks.checkpoint.type': 'CheckpointHook'}
    with pytest.raises(ValueError, match='AtomicCheckpointHook'):
        train(config('segmentation', tmp_path, **options))


@pytest.mark.skipif(not hasattr(torch, 'accelerator'), reason='torch.accelerator: torch 2.6')
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
