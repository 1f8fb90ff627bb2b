"""Save before a training ends early: on signals, and when a data loader worker is killed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..compat.mmengine import accumulative_counts
from ..startup import RESUME_ME, tell
from .checkpoints.saving import checkpoint_hook
from .processes import any_rank
from .training_scope import around_training

_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)
)
# how torch reports a dead worker, as opposed to one that raised an error
_LOST = re.compile(r'DataLoader worker \(pid')


class LostWorkerError(RuntimeError):
    """A worker of a data loader was killed."""


@HOOKS.register_module()
class InterruptHook(Hook):
    """Finish the iteration, save a checkpoint and leave, on a signal or when a worker is killed.

    On SIGTERM, SIGINT or SIGHUP the exit code is 75. Whichever rank gets the signal, all ranks stop
    after the same iteration. During validation, the state from before it is saved, and resuming
    validates again. A second SIGINT to a single process interrupts at once, as without this hook. A
    SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread Python cannot
    handle signals, so there they keep their default effect.

    Workers of a data loader are killed when memory runs out, for example.

    Raises:
        LostWorkerError: If a worker was killed, after the checkpoint was saved.
    """

    # after the checkpoint of the same iteration, before ReproducibilityHook
    priority = 95

    def __init__(self):
        self._signal: int | None = None
        self._lost_worker: str | None = None
        self._previous: dict[int, Any] = {}
        self._validates = False

    def before_run(self, runner: Runner) -> None:
        around_training(runner, lambda: self._training(runner))

    @contextlib.contextmanager
    def _training(self, runner: Runner) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # raised while waiting for a batch, between two iterations
            if isinstance(error, LostWorkerError) or not _LOST.match(str(error)):
                raise
            self._lost_worker = self._lost_worker or str(error)
            self._save_alone(runner)
            self._leave(runner, error)
        finally:
            self._restore_signals()

    def before_train(self, runner: Runner) -> None:
        self._signal = self._lost_worker = None
        self._validates = False
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number.name == 'SIGHUP' and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._remember)
        else:
            runner.logger.warning(
                'Python handles signals only in the main thread, where this training is not: '
                'SIGTERM and Ctrl-C will not save a checkpoint'
            )
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            loader.worker_init_fn = functools.partial(
                _start_worker, loader.worker_init_fn, os.getpid()
            )

    def before_train_iter(self, runner: Runner, **step: object) -> None:
        self._defer_errors_of_workers()

    def after_train_iter(self, runner: Runner, **step: object) -> None:
        done = runner.iter + 1
        # a checkpoint does not hold partially accumulated gradients
        accumulated = done % accumulative_counts(runner.optim_wrapper) == 0
        if any_rank(self._is_interrupted()) and (accumulated or done == runner.max_iters):
            hook = checkpoint_hook(runner)
            if hook is not None:
                hook.save_interrupted(runner, done)
            dist.barrier()
            self._leave(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self._validates = True
        self._defer_errors_of_workers()

    def after_val_iter(self, runner: Runner, **step: object) -> None:
        # ranks may have fewer images than others, so they do not synchronize: each gets the signal
        if self._validates and self._is_interrupted():
            self._save_alone(runner)
            self._leave(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._validates = False

    def after_train(self, runner: Runner) -> None:
        self._restore_signals()

    def _is_interrupted(self) -> bool:
        return self._signal is not None or self._lost_worker is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGINT and not dist.is_distributed():
                raise KeyboardInterrupt
            return
        self._signal = number
        tell(f'{signal.Signals(number).name}: finishing this iteration, saving, and leaving')

    def _defer_errors_of_workers(self) -> None:
        """Defer errors that torch's SIGCHLD handler raises mid-step to the end of the step."""
        torchs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, 'SIGCHLD') else None
        if not callable(torchs) or torchs == self._remember_worker or not self._previous:
            return
        self._previous[signal.SIGCHLD] = torchs
        signal.signal(signal.SIGCHLD, self._remember_worker)

    def _remember_worker(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous[number](number, frame)
        except RuntimeError as error:
            if not _LOST.match(str(error)):
                raise
            self._lost_worker = str(error)

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _save_alone(self, runner: Runner) -> None:
        """Save the state of training without waiting for other ranks."""
        if self._validates:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # swap the trained weights back in for the average
                    hook.after_val_epoch(runner)
        elif dist.is_distributed():
            return  # the other ranks are already in the next iteration
        hook = checkpoint_hook(runner)
        if hook is not None and dist.is_main_process():
            hook.save_interrupted(runner, runner.iter, together=not self._validates)

    def _leave(self, runner: Runner, error: Exception | None = None) -> NoReturn:
        self._restore_signals()
        if self._lost_worker is not None:
            raise LostWorkerError(_explained(self._lost_worker)) from error
        runner.logger.info(
            f'Interrupted and saved: exit code {RESUME_ME} means that --resume continues from here'
        )
        sys.exit(RESUME_ME)


def _explained(lost_worker: str) -> str:
    if 'Bus error' in lost_worker:
        return (
            f'{lost_worker.strip()} Enlarge /dev/shm (docker run --shm-size), or set a lower '
            'train_dataloader.num_workers, and go on with --resume'
        )
    if 'Segmentation fault' in lost_worker:
        return (
            f'{lost_worker.strip()} A library crashed that reads or augments images: '
            'train_dataloader.num_workers=0 and `python -X faulthandler` show where'
        )
    return (
        f'{lost_worker.strip()} Most likely the machine ran out of memory (`dmesg` says so if it '
        'did): set a lower train_dataloader.num_workers, and go on with --resume'
    )


def _start_worker(initialize: Callable | None, trainer: int, worker_id: int) -> None:
    """Keep a worker alive while its trainer needs it, even if a signal goes to all processes."""
    if hasattr(signal, 'sigwaitinfo'):  # on Linux, where schedulers signal every process of a job
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=_end_with_trainer, args=(trainer,), daemon=True).start()
    if initialize is not None:
        initialize(worker_id)


def _end_with_trainer(trainer: int) -> None:
    """Let only the trainer end this worker.

    The trainer need not be its parent: workers started by a fork server are children of that.
    """
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == trainer:
            os._exit(0)
