"""SIGTERM, SIGINT and SIGHUP: the iteration is finished, the state saved, the exit code is 75."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from polynext_mm import startup
from polynext_mm.engine import LostWorkerError
from tests.engine.runs import At, config, differences, saved, train
from tests.helpers.files import ROOT
from tests.marks import some_slow

pytestmark = pytest.mark.heavy

# by epoch, hook point, iterations done by then, what is saved
MOMENTS = [
    (False, 'before_train_iter', 2, 'interrupted_iter_3.pth'),
    (False, 'before_train_iter', 3, 'iter_4.pth'),
    (False, 'after_val_iter', 3, 'interrupted_iter_3.pth'),
    (True, 'before_train_iter', 2, 'interrupted_iter_3.pth'),
    (True, 'before_train_iter', 3, 'interrupted_iter_4.pth'),
    (True, 'after_val_iter', 4, 'epoch_2.pth'),
]


def settings(by_epoch):
    return dict(task='segmentation', by_epoch=by_epoch, iters=3 if by_epoch else 6)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The last checkpoints of the uninterrupted runs, by iteration and by epoch."""
    runs = []
    for by_epoch in (False, True):
        work_dir = tmp_path_factory.mktemp('whole')
        train(config(work_dir=work_dir, **settings(by_epoch)))
        runs.append(saved(work_dir / ('epoch_3.pth' if by_epoch else 'iter_6.pth')))
    return runs


@pytest.fixture
def no_nohup():
    """SIGHUP has its default action, which tests under nohup do not find."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('moment', some_slow(MOMENTS, MOMENTS[1:4]), ids=str)
def test_an_interrupted_run_is_finished_by_resuming(tmp_path, whole, moment, no_nohup):
    by_epoch, point, iteration, name = moment
    number = {2: signal.SIGINT, 3: signal.SIGTERM, 4: signal.SIGHUP}[iteration]
    stop = At(point, iteration, lambda runner: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        train(config(work_dir=tmp_path, **settings(by_epoch)), hooks=[stop])
    assert left.value.code == 75
    assert signal.getsignal(number) == before
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / name)
    train(config(work_dir=tmp_path, **settings(by_epoch)), resume=True)
    last = saved(tmp_path / ('epoch_3.pth' if by_epoch else 'iter_6.pth'))
    assert differences(last, whole[by_epoch]) == []
    hub, expected = (run['message_hub']['runtime_info'] for run in (last, whole[by_epoch]))
    assert hub['best_score'] == expected['best_score']
    assert not list(tmp_path.glob('interrupted*'))


def test_workers_outlive_a_signal_to_all_processes_of_a_job(tmp_path, whole):
    def signal_all(runner):
        workers = [str(worker.pid) for worker in multiprocessing.active_children()]
        assert len(workers) == 2
        subprocess.run(['kill', '-TERM', *workers, str(os.getpid())], check=True)

    options = dict(settings(False), **{'train_dataloader.num_workers': 2})
    with pytest.raises(SystemExit) as left:
        train(config(work_dir=tmp_path, **options), hooks=[At('before_train_iter', 2, signal_all)])
    assert left.value.code == 75
    train(config(work_dir=tmp_path, **options), resume=True)
    assert differences(saved(tmp_path / 'iter_6.pth'), whole[False]) == []


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    hang_up = At('before_train_iter', 1, lambda runner: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(config('segmentation', tmp_path, iters=2), hooks=[hang_up])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / 'iter_2.pth').exists()


def test_a_signal_before_there_is_anything_to_save(tmp_path):
    """While the config is read, in the first seconds: exit code 75 as well."""
    config_file = tmp_path / 'config.py'
    # an import would make it a lazy config for some versions of mmengine
    system = "__import__('os')"
    config_file.write_text(f'{system}.kill({system}.getpid(), {int(signal.SIGTERM)})\n')
    command = [sys.executable, '-W', 'ignore', ROOT / 'tools' / 'train.py', config_file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stderr.endswith('SIGTERM before the first iteration: exit code 75\n')


@pytest.mark.parametrize(
    'when', some_slow(['computing', 'waiting', 'validating'], ['waiting', 'validating'])
)
def test_a_killed_worker_costs_nothing(tmp_path, whole, when):
    """While an iteration computes torch would raise in the middle of it, or while it waits."""

    def kill(runner):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            if when == 'waiting':
                worker.join()  # torch's handler of SIGCHLD does not hear of those
            else:
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    point, iteration = ('after_val_iter', 3) if when == 'validating' else ('before_train_iter', 2)
    options = dict(
        settings(False),
        **{
            'train_dataloader.num_workers': 1,
            'train_dataloader.prefetch_factor': 1,
            'train_dataloader.persistent_workers': True,
        },
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LostWorkerError, match='ran out of memory.*go on with --resume'):
        train(config(work_dir=tmp_path, **options), hooks=[At(point, iteration, kill)])
    assert signal.getsignal(signal.SIGTERM) == before
    last = saved((tmp_path / 'last_checkpoint').read_text())
    assert last['meta']['iter'] in ((3, 4, 5) if when == 'waiting' else (3,))
    train(config(work_dir=tmp_path, **options), resume=True)
    assert differences(saved(tmp_path / 'iter_6.pth'), whole[False]) == []


def gone(kind):
    """Let stderr be what nobody reads."""
    if kind == 'closed':
        os.close(2)
    elif kind == 'full disk':
        os.dup2(os.open('/dev/full', os.O_WRONLY), 2)
    else:
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        if kind == 'reader gone':
            os.close(reader)
        else:
            os.set_blocking(2, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(2, bytes(4096))
            os.set_blocking(2, True)


STDERRS = pytest.mark.parametrize(
    'stderr',
    some_slow(
        ['closed', 'full disk', 'reader gone', 'reader stopped'], ['full disk', 'reader gone']
    ),
)


def forked(work, *arguments):
    """The exit code of work in a process of its own."""
    process = multiprocessing.get_context('fork').Process(target=work, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@STDERRS
def test_nobody_reads_what_is_told(tmp_path, stderr):
    def work():
        stop = At('before_train_iter', 2, lambda runner: os.kill(os.getpid(), signal.SIGTERM))
        options = {'train_dataloader.num_workers': 0}
        cfg = config(work_dir=tmp_path, **settings(False), **options)
        gone(stderr)
        train(cfg, hooks=[stop])

    assert forked(work) == 75
    assert saved(tmp_path / 'interrupted_iter_3.pth')['meta']['iter'] == 3


@STDERRS
def test_nobody_reads_what_is_told_at_the_start(stderr):
    def work():
        gone(stderr)
        with startup.resumable_start():
            signal.raise_signal(signal.SIGTERM)

    assert forked(work) == 75


def test_streams_that_nobody_reads_change_no_exit_code():
    """Python would make it 120 where it cannot flush them."""
    code = (
        'import sys\nfrom polynext_mm.startup import resumable_start\n'
        "with resumable_start():\n    print('x' * 100)\n    sys.exit(75)"
    )
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    with open('/dev/full', 'wb') as full:
        done = subprocess.run([sys.executable, '-c', code], stdout=full, env=environment)
    assert done.returncode == 75


def test_a_closed_stderr_is_no_file_of_the_run():
    code = (
        'import os\nfrom polynext_mm.startup import resumable_start\n'
        "with resumable_start():\n    assert os.open('/dev/null', os.O_RDONLY) > 2"
    )
    assert (
        subprocess.run(['sh', '-c', '"$0" -c "$1" 2>&- >&-', sys.executable, code]).returncode == 0
    )


@pytest.mark.parametrize('output', ['>&- 2>&-', '> /dev/full 2>&1'])
@pytest.mark.parametrize('verbose', ['', '--verbose'])
def test_a_training_without_an_output(tmp_path, output, verbose):
    """From its first moment on, where mm prints as it is imported."""
    options = {'default_hooks.checkpoint.interval': 1}
    config('segmentation', tmp_path / 'work', iters=1, **options).dump(tmp_path / 'run.py')
    command = f'"$0" -m polynext_mm train "$1" {verbose} {output}'
    done = subprocess.run(['sh', '-c', command, sys.executable, tmp_path / 'run.py'], cwd=ROOT)
    assert done.returncode == 0 and (tmp_path / 'work' / 'iter_1.pth').is_file()


@pytest.mark.slow
def test_a_second_sigint_interrupts_at_once(tmp_path):
    def twice(runner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(
            config(work_dir=tmp_path, **settings(False)), hooks=[At('before_train_iter', 1, twice)]
        )
