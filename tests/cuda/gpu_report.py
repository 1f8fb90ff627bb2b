"""Run what needs a GPU in stages, and report each as it ends: ``make test-cuda``.

Machines with GPUs come for minutes. So the stages are in the order of their value, each has a time
that it may take, and report.md in --out, to paste into an issue, is written after every step. With
--budget all of it ends in time: what was running is stopped, and what it had finished is reported.

The tests marked ``cuda`` compare the GPU with the CPU; benchmarks/run.py measures time and peak
memory beside the peers. POLYNEXT_TEST_DEVICE=cpu tries all of this on a CPU, smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from tests.cuda.on_device import DEVICE, RESULTS, is_available

ROOT = Path(__file__).resolve().parents[2]
LEAST = 10  # seconds in which a step can do anything


# What trainings do at their first start, here after the kernels were compiled.
CHECK = """
import sys, tempfile, time, os, torch
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()
from polynext_mm.nn import kernel_check
start = time.time()
result = kernel_check.check(torch.device(sys.argv[1]), [torch.float32, torch.bfloat16])
print(f'{result.text}, {time.time() - start:.1f} s', *result.findings, sep='\\n')
"""


class Step(NamedTuple):
    """A command of a stage.

    Args:
        program: 'pytest', 'benchmarks/run.py' or, for CHECK, 'kernel check'.
        arguments: Its own.
    """

    program: str
    arguments: tuple[str, ...]


class Stage(NamedTuple):
    """What is to be run, and the seconds that it may take."""

    title: str
    seconds: int
    steps: list[Step]


def stages(small: bool) -> list[Stage]:
    """Return all stages, the most valuable first.

    Args:
        small: For a trial of the stages on a CPU.
    """
    archs = ('cpolynext_t', 'apolynext_t') if small else ('cpolynext_s', 'apolynext_s')
    peers = ('timm:convformer_s18:channels_last', 'timm:caformer_s18:channels_last')
    models = archs if small else (peers[0], archs[0], peers[1], archs[1])
    how = ('--sizes', '64x64', '--rounds', '2') if small else ('--rounds', '20')
    how += ('--warmup', '1') if small else ('--warmup', '5', '--dtype', 'bfloat16')

    def times(form: str, batch: str, modes: Sequence[str], *more: str) -> Step:
        named = (f'{model}{form}' for model in models)
        return Step(
            'benchmarks/run.py',
            ('--models', *named, '--mode', *modes, '--batch', batch, *how, *more),
        )

    both, networks = ('inference', 'train'), 'test_whole_networks.py'
    forms, batches = (('',), ('2',)) if small else (('', '+graph'), ('8', '2'))
    memory = times('', '2' if small else '8', ('train',), '--memory')
    # for memory alone: the times are those of the other steps
    memory = memory._replace(arguments=(*memory.arguments, '--rounds', '1'))
    return [
        Stage(
            'Kernels, compiled in parallel and compared',
            180,
            # with the networks that the next stage measures, so that their kernels are there
            [
                Step('pytest', (networks, 'test_ops.py', '-k', f'test_ops or {_first(archs)}')),
                Step('kernel check', ()),
            ],
        ),
        Stage(
            'Whole steps beside the peers',
            240,
            [
                *(times(form, batch, both) for batch in batches for form in forms),
                memory,
            ],
        ),
        Stage(
            'Networks against the CPU, and training in mixed precision',
            180,
            [Step('pytest', ('test_training.py', networks, '-k', 'not compiled and not demo'))],
        ),
        Stage(
            'Where the time of a step goes',
            60,
            [
                Step(
                    'benchmarks/run.py',
                    ('--profile', archs[1], '--mode', 'train', '--batch', '8', *how),
                )
            ],
        ),
        Stage(
            'Compiled',
            240,
            [times('+compile', '8', (mode,)) for mode in both[: 1 if small else 2]],
        ),
        Stage(
            'The rest',
            600,
            [
                Step('pytest', ()),
                Step(
                    'benchmarks/run.py',
                    (
                        *('--attention', *(('256',) if small else ('1024', '4096', '16384'))),
                        *('--matrix-up-to', '4096', '--batch', '8', *how),
                    ),
                ),
            ],
        ),
    ]


def _first(archs: Sequence[str]) -> str:
    """Return pytest's -k for a training step of these networks in half precision."""
    named = ' or '.join(archs)
    return f'(autocast and bfloat16 and ln and ({named}))'


def machine() -> list[str]:
    """Describe the GPUs and the versions that a result depends on."""
    module = torch.get_device_module(DEVICE)
    lines = [f'{platform.platform()}, Python {platform.python_version()}']
    if DEVICE == 'cuda':
        for index in range(module.device_count()):
            gpu = module.get_device_properties(index)
            lines.append(
                f'{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability '
                f'{gpu.major}.{gpu.minor}'
            )
        lines.append(
            'driver '
            f'{_printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}, '
            f'CUDA {torch.version.cuda}, ROCm {torch.version.hip}, cuDNN '
            f'{torch.backends.cudnn.version()}'
        )
    else:
        lines.append(f'device {DEVICE}')
    packages = ('torch', 'torchvision', 'triton', 'timm', 'mmengine', 'onedl-mmengine')
    lines.append(', '.join(f'{name} {_version(name)}' for name in (*packages, 'polynext-mm')))
    lines.append(f'commit {_printed("git", "-C", ROOT, "describe", "--always", "--dirty")}')
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _printed(*command) -> str:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        return f'unknown ({error.strerror})'
    return ', '.join(dict.fromkeys(done.stdout.split('\n')[:-1])) or 'unknown'


class Outcome(NamedTuple):
    """How a step went: lines of the report, and whether it failed, other than by its time."""

    text: str
    failed: bool


def run_tests(arguments: Sequence[str], extra: Sequence[str], results: Path, limit: float):
    """Run tests marked cuda that were not run by an earlier stage."""
    before = len(_results(results))
    here = ROOT / 'tests' / 'cuda'
    chosen = [str(here / a) if a.endswith('.py') else a for a in arguments]
    if not any(a.endswith('.py') for a in arguments):
        chosen.insert(0, str(here))
    jobs = ('-n', str(min(16, os.cpu_count() or 1)))
    code, printed = _run(
        ('-m', 'pytest', '-m', 'cuda', '--tb=short', *chosen, *jobs, *extra),
        limit,
        **{RESULTS: str(results), 'OMP_NUM_THREADS': '1'},
    )
    # a test that was run twice, as those that a crash interrupts, counts once
    found = list({result['test']: result for result in _results(results)[before:]}.values())
    outcomes = [result['outcome'] for result in found]
    lines = [', '.join(f'{outcomes.count(o)} {o}' for o in ('passed', 'failed', 'skipped'))]
    for result in found:
        if result['outcome'] == 'failed':
            lines.append(f'failed: `{result["test"]}`: {result["message"]}')
    reasons = [result['message'] for result in found if result['outcome'] == 'skipped']
    for reason in dict.fromkeys(reasons):
        lines.append(f'skipped {reasons.count(reason)}: {reason}')
    failed = 'failed' in outcomes
    if code is None:
        lines.append(f'stopped after {limit:.0f} s, with tests left')
    elif code not in (0, 1, 5):  # passed, failed, all of them were run before
        failed = True
        lines.append(f'pytest ended with {code}: {_last(printed, 3)}')
    return Outcome(_bullets(lines), failed)


def _results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_program(arguments: Sequence[str], limit: float) -> Outcome:
    """Run a program that prints its part of the report."""
    code, printed = _run(arguments, limit)
    if code is None:
        return Outcome(f'stopped after {limit:.0f} s', failed=False)
    if code:
        return Outcome(f'failed with {code}:\n\n```\n{_last(printed, 15)}\n```', failed=True)
    return Outcome(printed.strip().replace('\n## ', '\n#### '), failed=False)


def _last(printed: str, count: int) -> str:
    return '\n'.join(printed.strip().splitlines()[-count:])


def _run(arguments: Sequence[str], limit: float, **env: str) -> tuple[int | None, str]:
    """Run a Python program.

    Returns:
        Its exit code, None if it was stopped, and what it printed; if it failed, its errors.
    """
    with tempfile.TemporaryFile('w+') as output, tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=output,
            stderr=errors,
            start_new_session=True,  # its workers end with it
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        errors.seek(0)
        return code, (errors.read() if code else '') or output.read()


def report(args: argparse.Namespace, results: Path) -> Iterator[Outcome]:
    """Run the stages, and yield what to append to the report after each of their steps."""
    yield Outcome(f'# PolyNeXt on a GPU\n\n{_bullets(machine())}', failed=False)
    end = time.monotonic() + args.budget
    for number, stage in enumerate(stages(small=DEVICE == 'cpu'), 1):
        start = time.monotonic()
        print(f'==> {number}. {stage.title} (at most {stage.seconds} s)', flush=True)
        yield Outcome(f'## {number}. {stage.title}', failed=False)
        for step in stage.steps:
            limit = min(end, start + stage.seconds) - time.monotonic()
            command = f'{step.program} {shlex.join(step.arguments)}'.strip()
            if limit < LEAST:
                spent = 'budget' if end < start + stage.seconds else "stage's time"
                yield Outcome(f'`{command}`: not run, the {spent} is spent', failed=False)
                continue
            began = time.monotonic()
            if step.program == 'pytest':
                outcome = run_tests(step.arguments, args.pytest, results, limit)
            elif step.program == 'kernel check':
                outcome = run_program(('-c', CHECK, DEVICE), limit)
            else:
                program = str(ROOT / step.program)
                outcome = run_program((program, '--device', DEVICE, *step.arguments), limit)
            took = time.monotonic() - began
            yield Outcome(f'`{command}`, {took:.0f} s:\n\n{outcome.text}', outcome.failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs') / 'cuda',
        help='folder of report.md (default: %(default)s)',
    )
    parser.add_argument(
        '--budget',
        type=float,
        default=float('inf'),
        metavar='SECONDS',
        help='stop after this time (default: the times of the stages together, 25 minutes)',
    )
    parser.add_argument(
        'pytest', nargs='*', help='more arguments of pytest, after --, such as -- -n 2'
    )
    args = parser.parse_args()
    if not is_available():
        print(
            f'skipped: torch {torch.__version__} finds no {DEVICE} device. On a machine with a '
            'GPU, see that nvidia-smi (or rocm-smi) lists it and that torch is a build for it'
        )
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = (args.out / 'tests.jsonl').absolute()
    results.write_text('')
    path = args.out / 'report.md'
    path.write_text('')
    failed = False
    for outcome in report(args, results):
        with path.open('a') as file:
            file.write(f'{outcome.text}\n\n')
        failed |= outcome.failed
    print(path.read_text())
    print(f'The report is in {path}: paste it into an issue')
    return 1 if failed else 0


def _bullets(lines: Sequence[str]) -> str:
    return '\n'.join(f'- {line}' for line in lines)


if __name__ == '__main__':
    sys.exit(main())
