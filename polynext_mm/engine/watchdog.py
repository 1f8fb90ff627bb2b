"""End the run, and name the rank, when a rank makes no progress for a given time."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.distributed import TCPStore

from ..startup import tell
from .training_scope import stop_after_training

_PREFIX = 'polynext_watchdog'


@HOOKS.register_module()
class WatchdogHook(Hook):
    """End the run when a rank has not moved for ``timeout`` seconds, and say which one.

    A rank moves when it begins or ends an iteration of training or validation. A thread in each
    rank reports its progress to the others. The frozen rank is the one whose thread is silent too
    (a stopped process, a dead machine) or, if all threads answer, the one that is behind. A whole
    job that was suspended (SIGSTOP, preemption) and continues is not frozen: a rank that wakes up
    much too late restarts its clock.

    Args:
        timeout: In seconds; longer than the longest evaluation of metrics.

    Raises:
        ValueError: For a timeout that is not positive.
    """

    def __init__(self, timeout: float = 1800.0):
        if not timeout > 0:
            raise ValueError(f'timeout must be positive, in seconds, got {timeout!r}')
        self.timeout = timeout
        self._steps = 0
        self._doing = 'starting'
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def before_run(self, runner: Runner) -> None:
        stop_after_training(runner, self._stop)

    def before_train(self, runner: Runner) -> None:
        self._move('starting')
        self._stopped = threading.Event()  # a previous training's thread keeps its own event
        self._thread = threading.Thread(
            target=self._watch, args=(self._stopped,), name='watchdog', daemon=True
        )
        self._thread.start()

    def before_train_iter(self, runner: Runner, **step: object) -> None:
        self._move(f'computing iteration {runner.iter + 1}')

    def after_train_iter(self, runner: Runner, **step: object) -> None:
        self._move(f'loading the data of iteration {runner.iter + 2}')

    def before_val_iter(self, runner: Runner, batch_idx: int, **step: object) -> None:
        self._move(f'validating batch {batch_idx + 1} after iteration {runner.iter}')

    def after_val(self, runner: Runner) -> None:
        self._move(f'going on after the validation of iteration {runner.iter}')

    def after_train(self, runner: Runner) -> None:
        self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(1.0)  # it takes longer only while waiting for a store that is gone

    def _move(self, doing: str) -> None:
        self._doing = doing
        self._steps += 1

    def _watch(self, stopped: threading.Event) -> None:
        """Exchange progress with the other ranks in a thread; end the process if one froze."""
        rank, ranks = dist.get_dist_info()
        store = _store(self.timeout) if ranks > 1 else None
        now = time.monotonic()
        steps, doing = [''] * ranks, ['starting'] * ranks
        beats, moved, beaten = [''] * ranks, [now] * ranks, [now] * ranks
        period = min(self.timeout / 5, 10.0)
        beat = 0
        while True:
            waits_since = time.monotonic()
            if stopped.wait(period):
                return
            now = time.monotonic()
            if now - waits_since > 2 * period:  # this process, perhaps the whole job, was suspended
                moved, beaten = [now] * ranks, [now] * ranks
            beat += 1
            reports = {rank: f'{beat}|{self._steps}|{self._doing}'}
            try:
                if store is not None:
                    store.set(f'{_PREFIX}/{rank}', reports[rank])
                    keys = {other: f'{_PREFIX}/{other}' for other in range(ranks) if other != rank}
                    reports |= {
                        other: store.get(key).decode()
                        for other, key in keys.items()
                        if store.check([key])
                    }
            except RuntimeError:
                pass  # the host of the store is frozen or dead: its silence is measured too
            now = time.monotonic()
            for other, report in reports.items():
                new_beat, new_steps, doing[other] = report.split('|', 2)
                if new_beat != beats[other]:
                    beats[other], beaten[other] = new_beat, now
                if new_steps != steps[other]:
                    steps[other], moved[other] = new_steps, now
            if all(now - since < self.timeout for since in moved):
                continue
            silent = [other for other in range(ranks) if now - beaten[other] > 3 * period]
            fewest = min(int(count or 0) for count in steps)
            behind = [other for other in range(ranks) if int(steps[other] or 0) == fewest]
            frozen = ', '.join(
                f'rank {other} (last seen {doing[other]})' for other in silent or behind
            )
            tell(
                f'TimeoutError: no progress for {self.timeout:g} seconds: {frozen} stands still. '
                'The run ends; go on from the last checkpoint with --resume'
            )
            os._exit(1)  # the main thread may wait for the others forever


def _store(timeout: float) -> TCPStore:
    """Return a separate connection to the store through which the ranks found each other."""
    return TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )
