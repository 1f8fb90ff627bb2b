"""What cannot be resumed from is named, and nothing in a file says what is removed."""

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from polynext_mm.weights import CheckpointError
from tests.engine.runs import config, saved, train

pytestmark = pytest.mark.heavy


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The file iter_2.pth of a run, with what it holds."""
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


NAMED = [
    '{tmp}/precious',
    '../precious/best_x_iter_1.pth',
    '{work}/notes.pth',
    '{tmp}/precious/best_x_iter_1.pth',
    '{work}/best_notes',
    'unsafe:{tmp}/precious',
    'file://{tmp}/precious',
]


@pytest.mark.parametrize(
    ('hook', 'named'),
    [('ours', NAMED[:3])]
    + [
        pytest.param(*case, marks=pytest.mark.slow) for case in (('ours', NAMED[3:]), ('mm', NAMED))
    ],
)
def test_no_file_that_a_checkpoint_names_is_removed(trained, work_dir, tmp_path, hook, named):
    precious = tmp_path / 'precious'
    (precious / 'more').mkdir(parents=True)
    (precious / 'best_x_iter_1.pth').write_text('')
    (work_dir / 'best_notes').mkdir()
    (work_dir / 'notes.pth').write_text('')
    for name in named:
        name = name.format(tmp=tmp_path, work=work_dir)
        content = saved(trained)
        info = content['message_hub']['runtime_info']
        info.update(best_ckpt=name, best_score=-1.0, last_ckpt=name)
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


UNFIT = {
    'no state of a training that': [
        lambda c: c['meta'].update(iter='2'),
        lambda c: c['meta'].pop('epoch'),
        lambda c: c.pop('message_hub'),
        lambda c: c.update(message_hub=[1]),
    ],
    'stem.weight is': [
        lambda c: c['state_dict'].update({'backbone.stem.weight': torch.ones(2)}),
    ],
    'its optimizer has groups of': [
        lambda c: c['optimizer']['param_groups'].pop(),
        lambda c: c['optimizer']['param_groups'][0]['params'].append(1000),
    ],
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
    about_to_train._resume = True
    for change in UNFIT[message]:
        content = saved(trained)
        change(content)
        path = tmp_path / 'somebody.pth'
        torch.save(content, path)
        about_to_train._load_from = str(path)
        with pytest.raises(CheckpointError, match=message) as caught:
            about_to_train.resume(str(path))
        assert str(path) in str(caught.value)


def test_the_same_unchanged_is_resumed_from(trained, about_to_train):
    """Else the test above would pass for any file."""
    about_to_train._resume, about_to_train._load_from = True, str(trained)
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
    with pytest.raises(CheckpointError, match=f'{key} is torch.int64') as caught:
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
