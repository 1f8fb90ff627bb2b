"""The watchdog of one process: it ends one that stands still, and not one that was suspended."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest

from polynext_mm.engine import WatchdogHook

pytestmark = pytest.mark.heavy

FORK = multiprocessing.get_context('fork')  # mm is imported once
TIMEOUT = 2.0


def start(seconds: float, stderr_is_gone: bool = False):
    """A process with a watchdog that computes one iteration for so long, and what it prints."""
    output, to_output = os.pipe()

    def work():
        os.dup2(to_output, 2)
        hook = WatchdogHook(TIMEOUT)
        runner = SimpleNamespace(iter=0)
        hook.before_train(runner)
        hook.before_train_iter(runner)
        os.write(2, b'began\n')
        if stderr_is_gone:
            os.close(2)
        for _ in range(round(seconds / 0.05)):  # time of its own, unlike one long sleep
            time.sleep(0.05)
        hook.after_train(runner)
        os._exit(0)

    process = FORK.Process(target=work)
    process.start()
    os.close(to_output)
    printed = os.fdopen(output)
    assert printed.readline() == 'began\n'
    return process, printed


def test_a_process_that_stands_still_is_ended_and_named():
    process, printed = start(60.0)
    process.join(30)
    assert process.exitcode == 1
    assert 'no progress for 2 seconds: rank 0 (last seen computing iteration 1)' in printed.read()


def test_a_process_that_stands_still_is_ended_without_a_stderr():
    process, _ = start(60.0, stderr_is_gone=True)
    process.join(30)
    assert process.exitcode == 1


def test_a_suspended_process_goes_on():
    process, printed = start(1.5)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0, printed.read()
