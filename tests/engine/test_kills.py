"""Runs killed at every operation on a file and at random moments.

Resuming always leads to the weights of the uninterrupted run, and nothing half written is left.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from tests.engine.runs import config, differences, saved, train

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context('fork')  # mm is imported once
LAST = 'iter_6.pth'
# docs/reliability.md names both numbers
CHOSEN_KILLS = 39
RANDOM_KILLS = 20
# what the hook does with files, as it names them
OPERATIONS = [(os, 'fsync'), (os, 'replace'), (Path, 'unlink')]


class Killer:
    """Kills its process before, in the middle of, or after the operation of a number."""

    def __init__(self, number: int, when: str):
        self.number, self.when, self.count = number, when, 0

    def install(self) -> None:
        for owner, name in OPERATIONS:
            setattr(owner, name, self.deadly(getattr(owner, name)))

    def deadly(self, operation):
        def operate(*arguments, **settings):
            if Path(sys._getframe(1).f_code.co_filename).name not in ('files.py', 'saving.py'):
                return operation(*arguments, **settings)
            self.count += 1
            if self.count != self.number:
                return operation(*arguments, **settings)
            if self.when == 'amid' and operation.__name__ == 'fsync':
                file = os.fstat(arguments[0])
                if stat.S_ISREG(file.st_mode):  # as if only half had reached the disk
                    os.ftruncate(arguments[0], file.st_size // 2)
            try:
                if self.when == 'after':
                    operation(*arguments, **settings)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

        return operate


def start(work_dir: Path, resume: bool, killer: Killer | None = None, **options):
    """A training in a process of its own."""

    def work():
        output = os.open(work_dir / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if killer is not None:
            killer.install()
        train(config('segmentation', work_dir, **options), resume=resume)
        os._exit(killer.count if killer else 0)

    work_dir.mkdir(exist_ok=True)
    process = FORK.Process(target=work)
    process.start()
    return process


def finish(work_dir: Path, **options) -> None:
    process = start(work_dir, True, **options)
    process.join()
    assert process.exitcode == 0, (work_dir / 'output.txt').read_text()[-3000:]


def check(work_dir: Path, whole: dict) -> None:
    """That a run ended as the uninterrupted one did, with its files alone."""
    assert differences(saved(work_dir / LAST), whole['last']) == []
    assert not list(work_dir.glob('.*.part'))
    assert sorted(path.name for path in work_dir.glob('*.pth')) == whole['files']
    best = next(work_dir.glob('best_*.pth'))
    assert differences_of_weights(saved(best), whole['best']) == []


def differences_of_weights(one: dict, other: dict) -> list[str]:
    return [
        key for key, value in other['state_dict'].items() if not value.equal(one['state_dict'][key])
    ]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The uninterrupted run: options, last and best checkpoint, files, operations, duration."""
    options = {'default_hooks.checkpoint.max_keep_ckpts': 1}  # nothing else to fall back on
    work_dir = tmp_path_factory.mktemp('runs') / 'whole'
    began = time.monotonic()
    process = start(work_dir, False, Killer(-1, 'never'), **options)
    process.join()
    assert process.exitcode > 0, (work_dir / 'output.txt').read_text()[-3000:]
    return dict(
        options=options,
        last=saved(work_dir / LAST),
        best=saved(next(work_dir.glob('best_*.pth'))),
        files=sorted(path.name for path in work_dir.glob('*.pth')),
        operations=process.exitcode,
        seconds=time.monotonic() - began,
    )


def test_killed_at_every_operation_on_a_file(whole, tmp_path):
    kills = 0
    for number in range(1, whole['operations'] + 1):
        when = ('amid', 'before', 'after')[number % 3]
        work_dir = tmp_path / f'{number}'
        process = start(work_dir, False, Killer(number, when), **whole['options'])
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        finish(work_dir, **whole['options'])
        check(work_dir, whole)
    print(f'{kills} kills at chosen moments survived')
    assert kills >= CHOSEN_KILLS


def test_killed_at_random_moments_again_and_again(whole, tmp_path):
    chance = random.Random(whole['operations'])
    kills, runs, resume = 0, 0, False
    while kills < RANDOM_KILLS:
        work_dir = tmp_path / str(runs)
        process = start(work_dir, resume, **whole['options'])
        process.join(chance.uniform(0.1, 1.0) * whole['seconds'])
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            resume = True
            continue
        assert process.exitcode == 0, (work_dir / 'output.txt').read_text()[-3000:]
        check(work_dir, whole)
        runs, resume = runs + 1, False
    if resume:
        finish(work_dir, **whole['options'])
        check(work_dir, whole)
    print(f'{kills} kills at random moments survived in {runs + resume} runs')
