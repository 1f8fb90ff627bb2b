"""Contexts that last exactly as long as a training, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from mmengine.runner import Runner

from ..compat.mmengine import trains


def around_training(
    runner: Runner, context: Callable[[], contextlib.AbstractContextManager]
) -> None:
    """Run a training within a context, which ends whether the training returns or raises.

    mmengine calls ``after_train`` only if nothing was raised, so in a notebook or a sweep, what a
    hook starts in ``before_train`` would outlive a failed training.

    Args:
        runner: At ``before_run``. Nothing happens if it does not train.
        context: Returns the context; called when the training loop starts.
    """
    if not trains(runner):
        return
    loop = runner.train_loop
    run = loop.run

    def run_within() -> Any:
        try:
            with context():
                return run()
        finally:
            vars(loop).pop('run', None)  # restores the class's method

    loop.run = run_within


def stop_after_training(runner: Runner, stop: Callable[[], object]) -> None:
    """Call ``stop`` when the training of a runner ends, whether it returns or raises."""

    def context() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.callback(stop)
        return stack

    around_training(runner, context)
