"""What a training started ends with it, however it ends, and in whatever thread it runs."""

import os
import signal
import threading

import pytest
from mmengine.registry import HOOKS

from tests.engine.runs import At, config, train

pytestmark = pytest.mark.heavy

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def fail(runner):
    raise ArithmeticError('of a user')


def leave(runner):
    raise SystemExit(3)


def interrupt(runner):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ('act', 'raised'),
    [(fail, ArithmeticError), (leave, SystemExit), (interrupt, SystemExit), (None, None)],
    ids=['exception', 'exit', 'signal', 'end'],
)
def test_threads_handlers_and_hooks_of_the_model_are_gone(tmp_path, act, raised):
    """As a notebook or a sweep needs it, which go on in the same process."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.enumerate()
    seen = []

    def look(runner):
        seen.append((runner, [thread.name for thread in threading.enumerate()]))
        if act is not None:
            act(runner)

    def run():
        train(config('segmentation', tmp_path, iters=2), hooks=[At('before_train_iter', 1, look)])

    if raised is None:
        run()
    else:
        with pytest.raises(raised):
            run()
    ((runner, names),) = seen
    assert 'watchdog' in names
    assert threading.enumerate() == threads
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert not runner.model._forward_hooks
    assert 'run' not in vars(runner.train_loop)


def test_a_training_that_failed_does_not_end_the_next_one(tmp_path):
    """The same hook objects, as when a Runner is told to train once more."""
    hook = HOOKS.build(dict(type='WatchdogHook', timeout=60.0))
    options = dict(iters=2, custom_hooks=[])
    with pytest.raises(ArithmeticError):
        train(
            config('segmentation', tmp_path / 'one', **options),
            hooks=[hook, At('before_train_iter', 1, fail)],
        )
    assert train(config('segmentation', tmp_path / 'two', **options), hooks=[hook]).iter == 2


def test_a_training_in_another_thread(tmp_path):
    """As of a server or a graphical interface."""
    done = []

    def work():
        done.append(train(config('segmentation', tmp_path, iters=2)).iter)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [2]
    (log,) = tmp_path.glob('*/*.log')
    assert 'SIGTERM and Ctrl-C will not save a checkpoint' in log.read_text()
