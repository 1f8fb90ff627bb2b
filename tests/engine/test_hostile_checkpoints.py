"""Resuming takes from a file what it needs, and nothing in a file says what is removed or read."""

import argparse
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from runs import config, saved, train

from marks import some_slow
from polynext_mm.engine.checkpoints import run_state
from polynext_mm.weights import CheckpointError

pytestmark = pytest.mark.usefixtures('quick_configs')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The file iter_2.pth of a run, with what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        from mmengine.config import Config

        patch.setattr(Config, 'pretty_text', property(lambda cfg: repr(cfg._cfg_dict)))
        work_dir = tmp_path_factory.mktemp('trained')
        train(config('segmentation', work_dir, iters=2))
    return work_dir / 'iter_2.pth'


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'work'
    folder.mkdir()
    return folder


def plain_config(work_dir, **settings):
    """A config as of somebody else's, with mmengine's own hook for checkpoints."""
    options = {
        'default_hooks.checkpoint.type': 'CheckpointHook',
        'custom_hooks': [dict(type='CheckpointGuardHook')],
        **settings,
    }
    return config('segmentation', work_dir, iters=3, **options)


def resumed(cfg, path):
    return train(cfg, resume=path)


@pytest.mark.parametrize('hook', some_slow(['ours', 'of mmengine'], ['of mmengine']))
def test_no_file_that_a_checkpoint_names_is_removed(trained, work_dir, tmp_path, hook):
    precious = tmp_path / 'precious'
    (precious / 'more').mkdir(parents=True)
    (precious / 'best_x_iter_1.pth').write_text('')
    (work_dir / 'best_notes').mkdir()
    (work_dir / 'notes.pth').write_text('')
    for named in (
        precious,
        precious / 'best_x_iter_1.pth',
        '../precious/best_x_iter_1.pth',
        work_dir / 'best_notes',
        work_dir / 'notes.pth',
        f'unsafe:{precious}',
        f'file://{precious}',
    ):
        content = saved(trained)
        info = content['message_hub']['runtime_info']
        info.update(best_ckpt=str(named), best_score=-1.0, last_ckpt=str(named))
        info.update(keep_ckpt_ids=['../../precious', '../precious', 2])
        torch.save(content, work_dir / 'iter_2.pth')
        options = {'default_hooks.checkpoint.max_keep_ckpts': 1}
        cfg = plain_config(work_dir, **options)
        if hook == 'ours':
            cfg = config('segmentation', work_dir, iters=3, **options)
        runner = resumed(cfg, work_dir / 'iter_2.pth')
        assert runner.iter == 3
        assert (precious / 'best_x_iter_1.pth').is_file() and (precious / 'more').is_dir()
        assert (work_dir / 'best_notes').is_dir() and (work_dir / 'notes.pth').is_file()
        best = Path(runner.message_hub.get_info('best_ckpt'))
        assert best.parent == work_dir and best.is_file()
        shutil.rmtree(work_dir / runner.timestamp)


def test_values_of_a_stranger_are_plain_or_left_out(trained, work_dir):
    content = saved(trained)
    info = content['message_hub']['runtime_info']
    info.update(
        dtype=np.dtype('f8'),
        number=np.float32(0.5),
        array=np.arange(3),
        space=argparse.Namespace(a=1),
        cfg='raise SystemExit',
        best_score='high',
    )
    content['message_hub']['log_scalars']['text'] = 'no history'
    content['args'] = argparse.Namespace(seed=3)
    content['own'] = dict(kept=[1, 2.5, 'x'])
    content['meta']['hook_msgs'] = dict(last_ckpt='/somewhere')
    torch.save(content, work_dir / 'iter_2.pth')
    taken = {}

    class Look(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            taken.update(checkpoint)

    cfg = config('segmentation', work_dir, iters=3)
    runner = train(cfg, resume=True, hooks=[Look()])
    assert runner.iter == 3
    hub = taken['message_hub']
    assert hub['runtime_info']['dtype'] == 'f8'
    assert type(hub['runtime_info']['number']) is float
    assert hub['runtime_info']['array'] == [0, 1, 2]
    assert not {'space', 'cfg', 'best_score'} & set(hub['runtime_info'])
    assert 'text' not in hub['log_scalars'] and 'train/loss' in hub['log_scalars']
    assert 'args' not in taken and taken['own'] == dict(kept=[1, 2.5, 'x'])
    assert set(taken['meta']) <= {'epoch', 'iter', 'seed', 'dataset_meta', 'time'}
    assert runner.message_hub.get_info('cfg') != 'raise SystemExit'
    log = max(work_dir.glob('*/*.log')).read_text()
    assert re.search('not taken from the checkpoint.*: args', log)


def moments(**changed):
    """A change of what the optimizer has of the first parameter; None removes."""

    def change(content):
        state = content['optimizer']['state'][0]
        for key, value in changed.items():
            state[key] = value(state[key]) if callable(value) else value
            if value is None:
                del state[key]

    return change


def group(**changed):
    return lambda content: content['optimizer']['param_groups'][0].update(changed)


def scheduler(**changed):
    return lambda content: content['param_schedulers'][0].update(changed)


def position(**changed):
    return lambda content: content['polynext_resume'].update(changed)


UNFIT = {
    'iter of meta is a str': lambda c: c['meta'].update(iter='2'),
    'iter of meta is not within': lambda c: c['meta'].update(iter=-2),
    'epoch of meta is a bool': lambda c: c['meta'].update(epoch=True),
    'seed of meta is not within': lambda c: c['meta'].update(seed=2**80),
    'no state of a training that could': lambda c: c.pop('message_hub'),
    'no state of a training that could be resumed': lambda c: c.update(message_hub=[1]),
    'optimizer is a list': lambda c: c.update(optimizer=[1]),
    'polynext_resume is a str': lambda c: c.update(polynext_resume='x'),
    'stem.weight is': lambda c: c['state_dict'].update({'backbone.stem.weight': torch.ones(2)}),
    # the optimizer
    'exp_avg is torch.float32 of .* instead of': moments(exp_avg=lambda v: torch.ones(2)),
    r'exp_avg is 1.0 instead of \(8, 3, 7, 7\)': moments(exp_avg=lambda v: torch.ones(1)),
    'exp_avg is torch.int64': moments(exp_avg=lambda v: v.long()),
    'exp_avg is torch.complex64': moments(exp_avg=lambda v: v.to(torch.complex64)),
    "exp_avg is 'text'": moments(exp_avg='text'),
    'exp_avg_sq is missing': moments(exp_avg_sq=None),
    'exp_avg_sq has negative squares': moments(exp_avg_sq=lambda v: v - 1),
    'exp_avg is not finite': moments(exp_avg=lambda v: v / 0),
    "step is 'text', not a number": moments(step='text'),
    'step is missing, not a number': moments(step=None),
    'step is -1.0, not a number from 0 up': moments(step=lambda v: torch.tensor(-1.0)),
    r'optimizer.state\[0\] is 3, not a dict': lambda c: c['optimizer']['state'].update({0: 3}),
    'optimizer.state is of other parameters: 100': (
        lambda c: c['optimizer']['state'].update({10**6: {}})
    ),
    'optimizer.state is missing': lambda c: c['optimizer'].pop('state'),
    'optimizer.param_groups is missing': lambda c: c['optimizer'].pop('param_groups'),
    "optimizer.param_groups is 'xx', not": lambda c: c['optimizer'].update(param_groups='xx'),
    'optimizer.param_groups has groups of': lambda c: c['optimizer']['param_groups'].pop(),
    'param_groups has groups of .None, ': lambda c: c['optimizer'].update(param_groups=[1, 2]),
    'has groups of .1, ': group(params=[0]),
    'optimizer.param_groups repeats a parameter': (
        lambda c: c['optimizer']['param_groups'][0]['params'].__setitem__(0, 1)
    ),
    r"param_groups\[0\].lr is 'text', not a number": group(lr='text'),
    'lr is nan, not a number': group(lr=float('nan')),
    'lr is -1.0, and must not be negative': group(lr=-1.0),
    r'betas has 1 values instead of 2': group(betas=(0.9,)),
    r"betas holds 'x', not a number": group(betas=(0.9, 'x')),
    "amsgrad is 'x', not a bool": group(amsgrad='x'),
    'max_exp_avg_sq is missing': group(amsgrad=True),
    'options with which AdamW cannot step': (
        lambda c: c['optimizer']['param_groups'][0].pop('betas')
    ),
    # schedulers
    "param_schedulers is 'xx', not a list": lambda c: c.update(param_schedulers='xx'),
    'param_schedulers is a dict, not a list': lambda c: c.update(param_schedulers={}),
    'param_schedulers has 1 schedulers, and this run has 2': lambda c: c['param_schedulers'].pop(),
    r'param_schedulers\[0\] is 3, not a dict': lambda c: c.update(param_schedulers=[3, 4]),
    "last_step is 'x', not a number of steps": scheduler(last_step='x'),
    'last_step is -7, not a number of steps': scheduler(last_step=-7),
    "_global_step is 'x', not a number of steps": scheduler(_global_step='x'),
    'last_step is missing': lambda c: c['param_schedulers'][0].pop('last_step'),
    'base_values has 1 values instead of': scheduler(base_values=[1.0]),
    "base_values holds 'x', not a number": (
        lambda c: c['param_schedulers'][0]['base_values'].__setitem__(0, 'x')
    ),
    'step is no value of a scheduler': scheduler(step=3),
    "end is 'x', not a number": scheduler(end='x'),
    # where the run was
    'polynext_resume.random_states is a int': position(random_states=3),
    'polynext_resume.random_states is a list': position(random_states=[3]),
    'polynext_resume.batches_of_epoch is 1000000': position(batches_of_epoch=10**6),
    "polynext_resume.batches_of_epoch is 'x'": position(batches_of_epoch='x'),
    'polynext_resume.batches_of_epoch is -3': position(batches_of_epoch=-3),
    "polynext_resume.batch_size is 'x'": position(batch_size='x'),
    'best_score of message_hub.runtime_info is inf': (
        lambda c: c['message_hub']['runtime_info'].update(best_score=float('inf'))
    ),
    'best_score of message_hub.runtime_info is nan': (
        lambda c: c['message_hub']['runtime_info'].update(best_score=float('nan'))
    ),
}


@pytest.fixture(scope='module')
def about_to_train(tmp_path_factory):
    """A Runner with all that a training has, before its first step."""
    stopped = []

    class Stop(Hook):
        def before_train(self, runner):
            stopped.append(runner)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cfg = config('segmentation', tmp_path_factory.mktemp('about'), iters=3)
        cfg.load_from, cfg.resume = None, True
        train(cfg, hooks=[Stop()])
    return stopped[0]


@pytest.mark.parametrize('message', UNFIT)
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(
    trained, about_to_train, tmp_path, message
):
    content = saved(trained)
    UNFIT[message](content)
    path = tmp_path / 'somebody.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        about_to_train.resume(str(path))
    assert str(path) in str(caught.value)


def test_the_same_unchanged_is_resumed_from(trained, about_to_train):
    """Else the test above would pass for any file."""
    about_to_train.resume(str(trained))
    assert about_to_train.iter == 2


@pytest.mark.parametrize('state', [{}, dict(python=(3, [1], None))])
def test_damaged_random_states_are_named(trained, work_dir, state):
    content = saved(trained)
    content['polynext_resume'].update(random_states=[state])
    path = work_dir / 'somebody.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='the random states in it are damaged') as caught:
        resumed(config('segmentation', work_dir, iters=3), path)
    assert str(path) in str(caught.value)


def test_loss_scales_are_checked(trained, tmp_path):
    """Those of float16; a file without one is resumed with the scale of the config."""
    path = tmp_path / 'somebody.pth'
    scale = dict(
        scale=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=1
    )
    own = {'optim_wrapper.type': 'AutocastOptimWrapper', 'optim_wrapper.dtype': 'float16'}
    for number, (changed, message) in enumerate(
        [
            (None, None),
            ({}, None),
            (dict(scale='x'), "loss_scaler.scale is 'x', not a positive number"),
            (dict(scale=float('inf')), 'loss_scaler.scale is inf, not a positive number'),
            (dict(growth_interval=None), 'loss_scaler.growth_interval is missing'),
            (3, 'loss_scaler is 3, not a dict'),
        ]
    ):
        content = saved(trained)
        if changed is not None:
            content['optimizer']['loss_scaler'] = (
                scale | changed if isinstance(changed, dict) else changed
            )
        torch.save(content, path)
        cfg = config('segmentation', tmp_path / str(number), iters=2, **own)
        if message is None:
            scaler = resumed(cfg, path).optim_wrapper.loss_scaler
            assert scaler.get_scale() == (1024.0 if changed == {} else 65536.0)
            continue
        with pytest.raises(CheckpointError, match=message) as caught:
            resumed(cfg, path)
        assert str(path) in str(caught.value)


def test_a_position_beyond_the_epoch_is_named(work_dir):
    """Each epoch has two batches."""
    train(config('segmentation', work_dir, iters=2, by_epoch=True))
    content = saved(work_dir / 'epoch_2.pth')
    content['polynext_resume'].update(batches_of_epoch=3)
    path = work_dir / 'somebody.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='is 3, and an epoch of this run has 2') as caught:
        resumed(config('segmentation', work_dir, iters=3, by_epoch=True), path)
    assert str(path) in str(caught.value)


OPTIMIZERS = {
    'SGD': {},
    'SGD with momentum': dict(momentum=0.9, nesterov=True),
    'Adam': dict(amsgrad=True),
    'AdamW': dict(foreach=True),
    'NAdam': {},
    'RAdam': {},
    'Adamax': {},
    'Adagrad': {},
    'Adadelta': {},
    'Adafactor': {},
    'ASGD': {},
    'RMSprop': dict(centered=True, momentum=0.9),
    'Rprop': {},
    'LBFGS': {},
}


@pytest.mark.parametrize('kind', [kind for kind in OPTIMIZERS if hasattr(torch.optim, kind)])
def test_honest_states_of_any_optimizer_are_resumed(kind):
    """With a parameter that had no gradient, and one of another shape than a matrix."""

    def built():
        model = torch.nn.ModuleList([torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 4)])
        optimizer = getattr(torch.optim, kind.split()[0])
        return model, OptimWrapper(optimizer(model.parameters(), lr=0.1, **OPTIMIZERS[kind]))

    model, wrapper = built()
    for param in model[0].parameters():
        param.grad = torch.ones_like(param)
    wrapper.optimizer.step(lambda: torch.tensor(1.0))
    model, own = built()
    runner = SimpleNamespace(model=model, hooks=[], optim_wrapper=own, param_schedulers=None)
    content = dict(optimizer=wrapper.state_dict())
    run_state.require_of_run(runner, content, 'file')
    own.load_state_dict(content['optimizer'])
    assert str(own.state_dict()['state']) == str(wrapper.state_dict()['state'])


def test_an_average_is_checked_as_the_weights_are(trained, work_dir):
    content = saved(trained)
    weights = content['state_dict']
    content['ema_state_dict'] = {f'module.{key}': value for key, value in weights.items()}
    content['ema_state_dict']['steps'] = torch.tensor(2)
    path = work_dir / 'somebody.pth'
    torch.save(content, path)

    def settings():
        cfg = config('segmentation', work_dir, iters=3)
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='EMAHook')]
        return cfg

    assert resumed(settings(), path).iter == 3
    key = 'decode_head.conv_seg.weight'
    content['ema_state_dict'][f'module.{key}'] = weights[key].long()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'ema_state_dict.*{key} is torch.int64') as caught:
        resumed(settings(), path)
    assert str(path) in str(caught.value)


def test_what_older_files_lack_stays_as_the_run_has_it(trained, work_dir):
    """Options of newer optimizers, values of newer schedulers, and all that is only of ours."""
    content = saved(trained)
    for each in content['optimizer']['param_groups']:
        for key in ('decoupled_weight_decay', 'maximize', 'differentiable', 'fused', 'foreach'):
            each.pop(key, None)
    for state in content['optimizer']['state'].values():
        state['step'] = int(state['step'])
    for each in content['param_schedulers']:
        each.pop('verbose', None)
        each['a_name_of_old'] = 1
    del content['polynext_resume']
    path = work_dir / 'somebody.pth'
    torch.save(content, path)
    assert resumed(config('segmentation', work_dir, iters=3), path).iter == 3


def test_unsafe_is_for_who_writes_it_down(trained, work_dir):
    """With the prefix, all of pickle is read, and resuming takes no more of it than of others."""
    content = saved(trained)
    content['own'] = Custom()
    path = work_dir / 'somebody.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='execute code'):
        resumed(config('segmentation', work_dir, iters=3), path)
    assert resumed(config('segmentation', work_dir, iters=3), f'unsafe:{path}').iter == 3


class Custom:
    """Somebody's own class."""


def test_another_batch_size_is_told(trained, work_dir):
    shutil.copy(trained, work_dir)
    cfg = config('segmentation', work_dir, iters=3, **{'train_dataloader.batch_size': 3})
    assert train(cfg, resume=True).iter == 3
    log = max(work_dir.glob('*/*.log')).read_text()
    assert 'of batches of 2 per process and this run has batches of 3' in log


def test_the_same_batch_size_is_not(trained, work_dir):
    shutil.copy(trained, work_dir)
    train(config('segmentation', work_dir, iters=3), resume=True)
    assert 'of batches of' not in max(work_dir.glob('*/*.log')).read_text()
