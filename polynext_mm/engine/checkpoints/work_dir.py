"""A work dir belongs to one run: a lock, no debris, and the newest whole checkpoint."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import logging
import os
import socket
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
# of file systems without POSIX locks: some of NFS, Lustre without -o flock, FUSE
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
# locks of this process, by work dir: closing a file would release it
_locks: dict[str, int] = {}


class WorkDirInUseError(RuntimeError):
    """Another run that is alive has the work dir."""


def lock(work_dir: str | os.PathLike) -> None:
    """Take a work dir for this process, until it ends or calls :func:`unlock`.

    The lock is the operating system's and ends with the process, however that ends; a leftover
    lock file is harmless. Processes forked from this one do not hold it. Where the file system
    has no locks, a warning says so and nothing is locked.

    Raises:
        WorkDirInUseError: If another process has it.
        OSError: If the folder cannot be written.
    """
    folder = _resolved(work_dir)
    if str(folder) in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # a link is not followed: what it points to would be truncated
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, 'is a link, and must be a file', str(folder / LOCK)) from None
    # a POSIX lock, unlike flock's, is not shared with the workers of data loaders
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors='replace').strip()
        os.close(file)
        raise WorkDirInUseError(
            f'{folder} belongs to a run that is alive ({owner}): end that one, or take another '
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


def unlock(work_dir: str | os.PathLike) -> None:
    """Give a work dir back, if this process has it."""
    file = _locks.pop(str(_resolved(work_dir)), None)
    if file is not None:
        os.close(file)


def _resolved(folder: str | os.PathLike) -> Path:
    try:
        return Path(folder).resolve()
    except RuntimeError:  # of Python before 3.13, instead of an OSError
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from None


def keep_aside(folder: Path, templates: Iterable[str] = ()) -> Path | None:
    """Move the checkpoints of an earlier training in a folder into a new one inside it.

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
    for path in [*found, folder / 'last_checkpoint']:
        if path.is_file():
            path.rename(place / path.name)
    return place


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Keep a work dir to one training at a time, and resume from its newest whole checkpoint.

    A second training in the work dir of one that lives is refused; so is one that saves into the
    same folder. What killed runs left half written is removed. Resuming without a named file takes
    the newest whole checkpoint, whatever ``last_checkpoint`` says, and the log says which, why, and
    what was passed over; where there is none the training starts afresh. A training that does not
    resume keeps the checkpoints of earlier ones aside.
    """

    # before anybody looks for what is resumed from
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
