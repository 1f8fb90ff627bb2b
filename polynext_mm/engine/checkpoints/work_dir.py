"""A work dir belongs to one run: a lock, no debris, and the newest whole checkpoint."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from ...weights import CheckpointError
from ..processes import on_main
from .saving import NONFINITE, Newest, checkpoint_hook, newest_checkpoint, remove_partial_files

LOCK = '.lock'
# of file systems without POSIX locks: some of NFS, Lustre without -o flock, FUSE
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
# locks of this process, by work dir: closing a file would release it
_locks: dict[str, int] = {}


class WorkDirInUseError(RuntimeError):
    """Another run that is alive has the work dir."""


def lock(work_dir: str | os.PathLike) -> None:
    """Take a work dir for this process, until it ends or calls :func:`unlock`.

    The lock is the operating system's and ends with the process, however that ends; the file that
    stays behind says nothing. Processes forked from this one do not hold it. Where the file system
    has no locks, a warning says so and nothing is locked.

    Raises:
        WorkDirInUseError: If another process has it.
        OSError: If the folder cannot be written.
    """
    folder = Path(work_dir).resolve()
    if str(folder) in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # a POSIX lock, unlike flock's, is not shared with the workers of data loaders
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors='replace').strip()
        os.close(file)
        raise WorkDirInUseError(
            f'{folder} belongs to a run that is alive ({owner}): end that one, or take another '
            '--work-dir'
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
    file = _locks.pop(str(Path(work_dir).resolve()), None)
    if file is not None:
        os.close(file)


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Keep a work dir to one training at a time, and resume from its newest whole checkpoint.

    A second training in the work dir of one that lives is refused. What killed runs left half
    written is removed. Resuming without a named file takes the newest whole checkpoint, whatever
    ``last_checkpoint`` says, and the log says which, why, and what was passed over; where there is
    none the training starts afresh.
    """

    # before anybody looks for what is resumed from
    priority = 'HIGHEST'

    def before_run(self, runner: Runner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):
            return  # an evaluation
        on_main(lambda: lock(runner.work_dir))
        hook = checkpoint_hook(runner)
        folder = hook.folder(runner) if hook else Path(runner.work_dir)
        if is_main_process():
            for place in {folder, Path(runner.work_dir)}:
                remove_partial_files(place)
        if runner._resume and runner._load_from is None:
            self._resume_from_newest(runner, folder)
        elif runner._resume:
            prefix = NONFINITE.split('{')[0]
            if Path(str(runner._load_from)).name.startswith(prefix):
                raise CheckpointError(
                    f'{runner._load_from} was saved because the loss was not finite: it is there '
                    'to be looked at, and cannot be resumed from'
                )

    @staticmethod
    def _resume_from_newest(runner: Runner, folder: Path) -> None:
        templates = [
            hook.filename_tmpl for hook in runner.hooks if isinstance(hook, CheckpointHook)
        ]
        newest: Newest = on_main(lambda: newest_checkpoint(folder, templates))
        runner.logger.info(newest.report)
        if newest.path is None:
            runner._resume = False
        else:
            runner._load_from = str(newest.path)

    def after_run(self, runner: Runner) -> None:
        unlock(runner.work_dir)
