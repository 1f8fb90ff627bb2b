"""SIGTERM, SIGINT and SIGHUP, sent before a kill or by a lost terminal: finish, save, leave."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..compat.mmengine import accumulative_counts
from ..startup import RESUME_ME
from .checkpoints.saving import checkpoint_hook
from .processes import any_rank

_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)
)


@HOOKS.register_module()
class InterruptHook(Hook):
    """On SIGTERM, SIGINT or SIGHUP, finish the iteration, save a checkpoint, exit with code 75.

    Whichever rank gets the signal, all of them stop after the same iteration. In a validation the
    state from before it is saved, and resuming validates again. A second SIGINT to a single process
    interrupts at once, as without this hook. A SIGHUP that is ignored, as under nohup, stays so.
    """

    # after the checkpoint of the same iteration, before what ReproducibilityHook starts
    priority = 95

    def __init__(self):
        self._signal: int | None = None
        self._previous: dict[int, Callable] = {}

    def before_train(self, runner: Runner) -> None:
        for number in _SIGNALS:
            if number.name == 'SIGHUP' and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)

    def after_train_iter(self, runner: Runner, **step: object) -> None:
        done = runner.iter + 1
        # gradients that wait for others to be added are not in a checkpoint
        accumulated = done % accumulative_counts(runner.optim_wrapper) == 0
        if any_rank(self._signal is not None) and (accumulated or done == runner.max_iters):
            hook = checkpoint_hook(runner)
            if hook is not None:
                hook.save_interrupted(runner, done)
            dist.barrier()
            self._leave(runner)

    def after_val_iter(self, runner: Runner, **step: object) -> None:
        # no word with the other ranks, which may have fewer images: each of them gets the signal
        if self._signal is None or not self._previous:
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # back from the average to the weights that are trained
                hook.after_val_epoch(runner)
        hook = checkpoint_hook(runner)
        if hook is not None and dist.is_main_process():
            hook.save_interrupted(runner, runner.iter, together=False)
        self._leave(runner)

    def after_train(self, runner: Runner) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGINT and not dist.is_distributed():
                raise KeyboardInterrupt
            return
        self._signal = number
        name = signal.Signals(number).name
        os.write(2, f'{name}: finishing this iteration, saving, and leaving\n'.encode())

    def _leave(self, runner: Runner) -> NoReturn:
        self.after_train(runner)
        runner.logger.info(
            f'Interrupted, and saved: exit code {RESUME_ME} says that --resume goes on from here'
        )
        sys.exit(RESUME_ME)


def _start_worker(initialize: Callable | None, worker_id: int) -> None:
    """A worker lives as long as its process needs it, whoever sends a signal to all of them."""
    if hasattr(signal, 'sigwaitinfo'):  # Linux, where schedulers signal every process of a job
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=_end_with_process, daemon=True).start()
    if initialize is not None:
        initialize(worker_id)


def _end_with_process() -> None:
    """Of a thread of a worker: end when its own process says so, and nobody else."""
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
