"""Checkpoints are found, kept and replaced whatever else is in the work dir."""

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from polynext_mm.engine.checkpoints.saving import newest_checkpoint
from polynext_mm.engine.checkpoints.work_dir import WorkDirInUseError, lock, unlock
from polynext_mm.weights import CheckpointError, containers
from tests.engine.runs import At, config, saved, train
from tests.marks import some_slow

FORK = multiprocessing.get_context('fork')  # mm is imported once


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir with iter_2, iter_3, iter_4 and the best checkpoint of the last two."""
    work_dir = tmp_path_factory.mktemp('trained')
    train(config('segmentation', work_dir, iters=4))
    return work_dir


@pytest.fixture
def work_dir(trained, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / 'work'))
    (copy / 'iter_3.pth').unlink()  # saved with the best
    return copy


# Resuming from the newest whole one


LAST_CHECKPOINTS = {
    'absent': None,
    'empty': b'',
    'binary': bytes(range(256)),
    'foreign': b'/somewhere/else/iter_900.pth',
    'older': b'iter_2.pth',
    'command': b'unsafe:/somewhere/evil.pth',
    'huge': b'x' * 10**6,
}


@pytest.mark.heavy
@pytest.mark.parametrize('text', LAST_CHECKPOINTS.values(), ids=LAST_CHECKPOINTS)
def test_last_checkpoint_does_not_decide(work_dir, text):
    file = work_dir / 'last_checkpoint'
    file.unlink() if text is None else file.write_bytes(text)
    newest = newest_checkpoint(work_dir)
    assert newest.path == work_dir / 'iter_4.pth'
    assert 'last_checkpoint' in newest.report


def cut(path, content):
    path.write_bytes(content[: len(content) // 2])


def flip(path, content):
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    place = record.header_offset + len(record.filename) + 64 + record.file_size // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


DAMAGES = {
    'cut': cut,
    'flipped': flip,
    'empty': lambda path, content: path.write_bytes(b''),
    'foreign': lambda path, content: torch.save([1, 2], path),
    'text': lambda path, content: path.write_text('<html>not found</html>'),
    'weights alone': lambda path, content: torch.save(
        {k: v for k, v in saved(path).items() if k in ('meta', 'state_dict')}, path
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_is_passed_over_and_named(work_dir, damage):
    path = work_dir / 'iter_4.pth'
    damage(path, path.read_bytes())
    newest = newest_checkpoint(work_dir)
    assert newest.path == work_dir / 'iter_2.pth'
    assert 'passed over iter_4.pth (' in newest.report


@pytest.mark.heavy
def test_none_whole_is_an_error_that_names_them(work_dir):
    for path in work_dir.glob('iter_*.pth'):
        cut(path, path.read_bytes())
    with pytest.raises(
        CheckpointError, match=r'iter_2.pth \(truncated\), iter_4.pth \(truncated\)'
    ):
        newest_checkpoint(work_dir)


@pytest.mark.heavy
def test_only_the_one_that_is_used_is_read_whole(work_dir, monkeypatch):
    for number in range(5, 30):
        shutil.copy(work_dir / 'iter_2.pth', work_dir / f'iter_{number}.pth')
    whole, outlined = [], []
    damage, outline = containers.damage, containers.outline
    monkeypatch.setattr(containers, 'damage', lambda p: whole.append(p) or damage(p))
    monkeypatch.setattr(containers, 'outline', lambda p: outlined.append(p) or outline(p))
    for _ in range(2):
        assert newest_checkpoint(work_dir).path == work_dir / 'iter_4.pth'
    assert set(whole) == {work_dir / 'iter_4.pth'}
    assert len(outlined) == 27


@pytest.mark.heavy
def test_newest_is_written_last_and_not_of_the_highest_number(work_dir, tmp_path):
    stale = saved(work_dir / 'iter_4.pth')
    stale['polynext_resume']['saved_at'] -= 3600
    stale['meta']['iter'] = 900
    torch.save(stale, work_dir / 'iter_900.pth')  # of a run before, in the same work dir
    os.utime(work_dir / 'iter_2.pth')
    assert newest_checkpoint(work_dir).path == work_dir / 'iter_4.pth'


@pytest.mark.heavy
@pytest.mark.parametrize('named', some_slow([False, True], [False]), ids=['newest', 'named file'])
def test_a_clock_that_was_set_back_does_not_matter(work_dir, monkeypatch, named):
    clock = time.time
    monkeypatch.setattr(time, 'time', lambda: clock() - 3600)
    options = {'default_hooks.checkpoint.save_best': None, 'train_cfg.val_interval': 100}
    resume = work_dir / 'iter_2.pth' if named else True  # iter_4 is there, and newer
    train(config('segmentation', work_dir, iters=6, **options), resume=resume)
    newest = newest_checkpoint(work_dir)
    assert newest.path == work_dir / 'iter_6.pth'
    order = [saved(work_dir / f'iter_{i}.pth')['polynext_resume']['saved_at'] for i in (2, 4, 6)]
    assert order == sorted(set(order))


@pytest.mark.heavy
def test_best_and_nonfinite_files_are_no_candidates(work_dir):
    shutil.copy(work_dir / 'iter_4.pth', work_dir / 'nonfinite_iter_9.pth')
    shutil.copy(work_dir / 'iter_4.pth', work_dir / 'best_mIoU_iter_9.pth')
    shutil.copy(work_dir / 'iter_4.pth', work_dir / '.iter_9.pth.77.part')
    newest = newest_checkpoint(work_dir)
    assert newest.path == work_dir / 'iter_4.pth' and 'of 2 checkpoints' in newest.report


@pytest.mark.heavy
def test_resuming_in_an_empty_work_dir_starts_afresh(tmp_path):
    runner = train(config('segmentation', tmp_path, iters=2), resume=True)
    assert runner.iter == 2 and (tmp_path / 'iter_2.pth').is_file()


@pytest.mark.heavy
def test_a_copied_work_dir_leaves_the_original_alone(work_dir, tmp_path):
    best = next(work_dir.glob('best_*.pth'))
    (work_dir / 'iter_4.pth').unlink()
    cfg = config('segmentation', tmp_path / 'copy', iters=4)
    shutil.copytree(work_dir, tmp_path / 'copy')
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob('*.pth')}

    def forget_score(runner):
        runner.message_hub.runtime_info['best_score'] = -1.0  # so that the next one is a new best

    runner = train(cfg, resume=True, hooks=[At('before_train', 2, forget_score)])
    assert runner._load_from == str(tmp_path / 'copy' / 'iter_2.pth')
    assert {path: path.stat().st_mtime_ns for path in work_dir.rglob('*.pth')} == before
    assert best.is_file()
    assert Path(runner.message_hub.get_info('best_ckpt')).parent == tmp_path / 'copy'


@pytest.mark.heavy
def test_a_truncated_best_file_is_noticed(work_dir):
    best = next(work_dir.glob('best_*.pth'))
    cut(best, best.read_bytes())
    runner = train(config('segmentation', work_dir, iters=6), resume=True)
    log = max(work_dir.glob('*/*.log')).read_text()
    assert f'{best} is truncated or damaged' in log and 'saves a new best checkpoint' in log
    assert runner.message_hub.get_info('best_ckpt') == str(work_dir / 'best_mIoU_iter_6.pth')


# Keeping


@pytest.mark.heavy
@pytest.mark.parametrize('start', some_slow([None, 'iter_2.pth'], [None]))
def test_a_training_that_does_not_resume_keeps_earlier_checkpoints_aside(work_dir, start):
    before = {path.name: path.read_bytes() for path in work_dir.glob('*.pth')}
    cfg = config('segmentation', work_dir, iters=2)
    cfg.load_from = start and str(work_dir / start)
    runner = train(cfg)
    assert runner.iter == 2
    kept = {path.name: path.read_bytes() for path in (work_dir / 'earlier_1').glob('*.pth')}
    assert kept == before
    assert [path.name for path in work_dir.glob('iter_*.pth')] == ['iter_2.pth']
    assert '--resume' in max(work_dir.glob('*/*.log')).read_text()


@pytest.mark.heavy
def test_only_so_many_are_kept_and_no_debris_stays(tmp_path):
    (tmp_path / '.iter_7.pth.123.part').write_text('of a killed run')
    (tmp_path / '.hidden.part').write_text('of somebody else')
    options = {'default_hooks.checkpoint.max_keep_ckpts': 1}
    train(config('segmentation', tmp_path, iters=6, **options))
    assert [path.name for path in tmp_path.glob('iter_*')] == ['iter_6.pth']
    assert len(list(tmp_path.glob('best_*'))) == 1
    assert [path.name for path in tmp_path.glob('*.part')] == ['.hidden.part']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_6.pth')


@pytest.mark.heavy
def test_saving_is_that_of_mmengine(tmp_path):
    """The same files with the same weights, at the same iterations, as of its own hook."""
    own, mmengines = tmp_path / 'own', tmp_path / 'mmengines'
    once = {'train_cfg.val_interval': 4}  # which of two validations is the best may differ
    train(config('segmentation', own, iters=4, **once))
    options = {
        'default_hooks.checkpoint.type': 'CheckpointHook',
        'custom_hooks': [dict(type='CheckpointGuardHook')],
    }
    plain = train(config('segmentation', mmengines, iters=4, **once, **options))
    assert any(type(hook) is CheckpointHook for hook in plain.hooks)
    names = [sorted(path.name for path in place.glob('*.pth')) for place in (own, mmengines)]
    assert names[0] == names[1] == ['best_mIoU_iter_4.pth', 'iter_2.pth', 'iter_4.pth']
    ours, theirs = (saved(place / 'iter_4.pth') for place in (own, mmengines))
    assert ours.keys() - theirs.keys() == {'polynext_resume'}
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()


@pytest.mark.heavy
def test_remote_storage_is_refused(tmp_path):
    options = {'default_hooks.checkpoint.backend_args': dict(backend='petrel')}
    with pytest.raises(ValueError, match="type='CheckpointHook'"):
        train(config('segmentation', tmp_path, iters=2, **options))


@pytest.mark.heavy
def test_published_files_are_written_whole(tmp_path):
    options = {'default_hooks.checkpoint.published_keys': ['meta', 'state_dict']}
    train(config('segmentation', tmp_path, iters=2, **options))
    published = next(tmp_path.glob('iter_2-*.pth'))
    assert saved(published).keys() == {'meta', 'state_dict'}


# Disks that refuse


@pytest.mark.heavy
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(runner):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))

    try:
        with pytest.raises(CheckpointError) as caught:
            train(
                config('segmentation', tmp_path, iters=4),
                hooks=[At('before_train_iter', 3, fill)],
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / 'iter_4.pth') in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob('.*.part')) and not (tmp_path / 'iter_4.pth').exists()
    assert newest_checkpoint(tmp_path).path == tmp_path / 'iter_3.pth'
    assert train(config('segmentation', tmp_path, iters=4), resume=True).iter == 4


@pytest.fixture
def nobody():
    """Without root's rights, to whom no folder is read-only."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_read_only_folder_is_named(nobody):
    # the folders of pytest are root's
    assert not os.access('/usr', os.W_OK, effective_ids=True)
    with pytest.raises(PermissionError, match='/usr/polynext_work_dir'):
        lock('/usr/polynext_work_dir')


@pytest.mark.heavy
def test_a_folder_that_became_read_only_is_named(trained, tmp_path):
    from polynext_mm.engine.checkpoints.saving import write_atomically

    (tmp_path / 'work').mkdir()
    target = tmp_path / 'work' / 'iter_4.pth'
    target.write_bytes(b'old')
    target.parent.chmod(0o555)
    tmp_path.chmod(0o755)
    was_root = os.geteuid() == 0
    if was_root:
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(0o755) if parent.owner() == 'root' and 'pytest' in str(parent) else None
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=f'{target} could not be written'):
            write_atomically(target, b'new')
    finally:
        if was_root:
            os.seteuid(0)
        target.parent.chmod(0o755)
    assert target.read_bytes() == b'old'


# One run at a time


@pytest.mark.heavy
def test_a_work_dir_belongs_to_one_run_until_that_ends(tmp_path):
    reader, writer = os.pipe()

    def hold():
        os.setpgid(0, 0)
        lock(tmp_path)
        if os.fork():  # a worker of a data loader outlives its process for a while
            os.write(writer, b'locked')
        time.sleep(60)

    holder = FORK.Process(target=hold)
    holder.start()
    try:
        assert os.read(reader, 6) == b'locked'
        with pytest.raises(WorkDirInUseError, match=f'process {holder.pid} on '):
            train(config('segmentation', tmp_path))
        holder.kill()
        holder.join()
        lock(tmp_path)
        unlock(tmp_path)
    finally:
        os.killpg(holder.pid, 9)


def no_locks(monkeypatch, number, kinds=('fcntl', 'lockf')):
    """Let the file system refuse kinds of locks: of Linux, and POSIX's."""

    def refuse(file, *command):
        raise OSError(number, os.strerror(number))

    for kind in kinds:
        monkeypatch.setattr(fcntl, kind, refuse)


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, number):
    warnings = []
    no_locks(monkeypatch, number)
    monkeypatch.setattr(
        'polynext_mm.engine.checkpoints.work_dir.print_log',
        lambda text, **options: warnings.append(text),
    )
    lock(tmp_path)
    lock(tmp_path)
    unlock(tmp_path)
    assert len(warnings) == 1 and '\n' not in warnings[0]
    assert f'the file system of {tmp_path} has no locks ({os.strerror(number)})' in warnings[0]


def test_another_error_of_a_lock_stays_one(tmp_path, monkeypatch):
    no_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match='Input/output error'):
        lock(tmp_path)


LOCKING = """
import sys
from polynext_mm.engine.checkpoints.work_dir import lock
lock(sys.argv[1])
"""


def locks(folder):
    """Whether another process gets the lock of a work dir."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', LOCKING, folder], capture_output=True, text=True
    )
    assert done.returncode == 0 or 'WorkDirInUseError' in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(fcntl, 'F_OFD_SETLK'), reason='POSIX locks go with any close')
def test_a_lock_stays_when_its_file_is_read(tmp_path):
    lock(tmp_path)
    assert (tmp_path / '.lock').read_text().startswith(f'process {os.getpid()} on ')
    assert not locks(tmp_path)
    unlock(tmp_path)
    assert locks(tmp_path)


@pytest.mark.heavy
def test_a_file_system_with_posix_locks_alone_is_locked(tmp_path, monkeypatch):
    no_locks(monkeypatch, errno.EINVAL, ['fcntl'])
    lock(tmp_path)
    assert not locks(tmp_path)
    unlock(tmp_path)


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path):
    precious = tmp_path / 'precious.txt'
    precious.write_text('precious')
    (tmp_path / '.lock').symlink_to(precious)
    with pytest.raises(OSError, match='is a link'):
        lock(tmp_path)
    assert precious.read_text() == 'precious'


@pytest.mark.heavy
def test_a_folder_of_checkpoints_belongs_to_one_run_too(tmp_path, monkeypatch):
    locked = []
    module = 'polynext_mm.engine.checkpoints.work_dir'
    monkeypatch.setattr(f'{module}.lock', lambda folder: locked.append(Path(folder)))
    out_dir = tmp_path / 'out'
    options = {'default_hooks.checkpoint.out_dir': str(out_dir)}
    train(config('segmentation', tmp_path / 'work', iters=2, **options))
    assert locked == [tmp_path / 'work', out_dir / 'work']


@pytest.mark.heavy
def test_the_lock_is_given_back_after_training(tmp_path):
    runner = train(config('segmentation', tmp_path, iters=2))
    assert isinstance(runner, Runner)
    assert locks(tmp_path)
