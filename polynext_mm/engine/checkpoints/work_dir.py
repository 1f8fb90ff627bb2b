"""A work dir belongs to one run at a time, which cleans it up and resumes from it."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import logging
import os
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...compat import mmengine as private
from ...weights import CheckpointError
from ..processes import on_main
from .saving import (
    NONFINITE,
    Newest,
    checkpoint_hook,
    newest_checkpoint,
    remove_partial_files,
    times_of_checkpoints,
)

LOCK = '.lock'
REPORT = 'report'
# raised by file systems without POSIX locks: some NFS and FUSE, Lustre without -o flock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
# lock files of this process by work dir, open while they are locked
_locks: dict[str, int] = {}


class WorkDirInUseError(RuntimeError):
    """A work dir is in use by another running training."""


def lock(work_dir: str | os.PathLike) -> None:
    """Take a work dir for this process, until it ends or calls :func:`unlock`.

    The operating system holds the lock and releases it when the process ends, in whatever way; a
    leftover lock file is harmless. Forked processes do not hold it. On a file system without
    locks, this warns and locks nothing.

    Raises:
        WorkDirInUseError: If another process has it.
        OSError: If the folder cannot be written.
    """
    folder = _resolved(work_dir)
    if str(folder) in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # do not follow a link: its target would be truncated
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, 'is a link, and must be a file', str(folder / LOCK)) from None
    try:
        _take(file)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors='replace').strip()
        os.close(file)
        raise WorkDirInUseError(
            f'{folder} is in use by a running training ({owner}): end that one, or use another '
            '--work-dir, or another out_dir of the checkpoint hook if it is that'
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
        print_log(
            f'the file system of {folder} has no locks ({error.strerror}): nothing keeps a second '
            'training out of this work dir, so start one at a time',
            logger='current',
            level=logging.WARNING,
        )
    os.ftruncate(file, 0)
    started = time.strftime('%Y-%m-%d %H:%M:%S')
    os.write(file, f'process {os.getpid()} on {socket.gethostname()}, since {started}\n'.encode())
    _locks[str(folder)] = file


def _take(file: int) -> None:
    """Lock an open file without waiting.

    Linux's open file description locks survive when code in this process opens and closes the
    file, as a backup of the work dir does; a POSIX lock would be lost. Each excludes the other.
    """
    command = getattr(fcntl, 'F_OFD_SETLK', None)
    if command is not None:
        whole_file = struct.pack('hhqqi', fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(file, command, whole_file)
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the file system has none
                raise
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    """Close the lock files in a forked process: a worker may outlive its trainer."""
    for file in _locks.values():
        os.close(file)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def unlock(work_dir: str | os.PathLike) -> None:
    """Release a work dir, if this process holds it."""
    file = _locks.pop(str(_resolved(work_dir)), None)
    if file is not None:
        os.close(file)


def _resolved(folder: str | os.PathLike) -> Path:
    try:
        return Path(folder).resolve()
    except RuntimeError:  # raised before Python 3.13 instead of an OSError
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from None


def keep_aside(folder: Path, templates: Iterable[str] = ()) -> Path | None:
    """Move an earlier training's checkpoints and report into a new folder inside theirs.

    Args:
        folder: Where the checkpoints are.
        templates: File names with a {} for the step, in addition to the usual ones.

    Returns:
        The new folder; None if there are none.
    """
    times, problems = times_of_checkpoints(folder, templates)
    others = [*folder.glob('best_*.pth'), *folder.glob(NONFINITE.format('*'))]
    found = [path for path in {*times, *problems, *others} if path.is_file()]
    if not found:
        return None
    numbers = itertools.count(1)
    place = next(p for p in (folder / f'earlier_{n}' for n in numbers) if not p.exists())
    place.mkdir()
    for path in [*found, folder / 'last_checkpoint', folder / REPORT]:
        if path.exists():
            path.rename(place / path.name)
    return place


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Keep a work dir to one training at a time, and resume from its newest whole checkpoint.

    A second training is refused if it uses the work dir or the checkpoint folder of a running one.
    Half-written files of killed runs are removed. Resuming without a named file takes the newest
    whole checkpoint, whatever ``last_checkpoint`` says, and logs which one, why, and which others
    were passed over; if there is none, training starts afresh. A training that does not resume
    moves the checkpoints of earlier ones aside.
    """

    # before any hook looks for the checkpoint to resume from
    priority = 'HIGHEST'

    def before_run(self, runner: Runner) -> None:
        if not private.trains(runner):
            return
        hook = checkpoint_hook(runner)
        folder = hook.folder(runner) if hook else Path(runner.work_dir)
        templates = [
            hook.filename_tmpl for hook in runner.hooks if isinstance(hook, CheckpointHook)
        ]
        for place in dict.fromkeys([Path(runner.work_dir), folder]):
            on_main(functools.partial(lock, place))
            if is_main_process():
                remove_partial_files(place)
        if not private.resumes(runner):
            self._keep_aside(runner, folder, templates)
        elif private.load_from(runner) is None:
            self._resume_from_newest(runner, folder, templates)
        elif Path(str(private.load_from(runner))).name.startswith(NONFINITE.split('{')[0]):
            raise CheckpointError(
                f'{private.load_from(runner)} was saved because the loss was not finite: it is '
                'there to be looked at, and cannot be resumed from'
            )

    @staticmethod
    def _keep_aside(runner: Runner, folder: Path, templates: list[str]) -> None:
        place: Path | None = on_main(lambda: keep_aside(folder, templates))
        if place is None:
            return
        runner.logger.warning(
            f'The checkpoints of an earlier training in {folder} were moved to {place}, since '
            'this one does not resume. To go on with that one instead, stop, and train with '
            f'--resume and the newest of them as its FILE, in another --work-dir'
        )
        start = Path(str(private.load_from(runner))).expanduser()
        if private.load_from(runner) and start.parent.resolve() == folder.resolve():
            moved = place / start.name
            if moved.is_file():
                private.set_load_from(runner, str(moved))

    @staticmethod
    def _resume_from_newest(runner: Runner, folder: Path, templates: list[str]) -> None:
        newest: Newest = on_main(lambda: newest_checkpoint(folder, templates))
        runner.logger.info(newest.report)
        private.set_resume(runner, None if newest.path is None else str(newest.path))

    def after_run(self, runner: Runner) -> None:
        hook = checkpoint_hook(runner)
        for place in {runner.work_dir, hook.folder(runner) if hook else runner.work_dir}:
            unlock(place)
