"""Resuming takes from a file what it needs, and nothing in a file says what is removed or read."""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from runs import config, saved, train

from marks import some_slow
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


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c['meta'].update(iter='2'), 'iter of meta is a str'),
        (lambda c: c['meta'].update(iter=-2), 'iter of meta is not within'),
        (lambda c: c['meta'].update(epoch=True), 'epoch of meta is a bool'),
        (lambda c: c['meta'].update(seed=2**80), 'seed of meta is not within'),
        (lambda c: c.pop('message_hub'), 'no state of a training that could be resumed'),
        (lambda c: c.update(message_hub=[1]), 'no state of a training that could be resumed'),
        (lambda c: c.update(optimizer=[1]), 'optimizer is a list'),
        (lambda c: c.update(polynext_resume='x'), 'polynext_resume is a str'),
        (
            lambda c: c['polynext_resume'].update(random_states=[dict(python=(3, [1], None))]),
            'the random states in it are damaged',
        ),
        (
            lambda c: c['state_dict'].update({'backbone.stem.weight': torch.ones(2)}),
            'backbone.stem.weight|stem.weight is',
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(trained, work_dir, change, message):
    content = saved(trained)
    change(content)
    path = work_dir / 'somebody.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        resumed(config('segmentation', work_dir, iters=3), path)
    assert str(path) in str(caught.value)


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
