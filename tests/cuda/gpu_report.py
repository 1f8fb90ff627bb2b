"""Run everything that needs a GPU, and write a report to paste into an issue: ``make test-cuda``.

The tests marked ``cuda`` compare the GPU with the CPU; then benchmarks/run.py measures time and
peak memory beside the peers. POLYNEXT_TEST_DEVICE=cpu tries all of this on a CPU, smaller.
"""

import argparse
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path

import torch

from tests.cuda.on_device import DEVICE, is_available

ROOT = Path(__file__).resolve().parents[2]
PEERS = ('timm:convformer_s18:channels_last', 'timm:caformer_s18:channels_last')
BENCHMARKS = {
    'Time and peak memory beside peers': [
        *('--models', PEERS[0], 'cpolynext_s', PEERS[1], 'apolynext_s'),
        *('--mode', 'inference', 'train', '--batch', '8', '--dtype', 'bfloat16', '--memory'),
        *('--rounds', '20', '--warmup', '5'),
    ],
    'As one CUDA graph, without the time of the host': [
        *('--models', f'{PEERS[0]}+graph', 'cpolynext_s+graph'),
        *(f'{PEERS[1]}+graph', 'apolynext_s+graph'),
        *('--mode', 'inference', 'train', '--batch', '8', '--dtype', 'bfloat16'),
        *('--rounds', '20', '--warmup', '5'),
    ],
    'Compiled': [
        *('--models', f'{PEERS[0]}+compile', 'cpolynext_s+compile'),
        *(f'{PEERS[1]}+compile', 'apolynext_s+compile'),
        *('--mode', 'inference', 'train', '--batch', '8', '--dtype', 'bfloat16'),
        *('--rounds', '20', '--warmup', '5'),
    ],
    'Polynomial attention alone': [
        *('--attention', '1024', '4096', '16384', '--matrix-up-to', '4096'),
        *('--batch', '8', '--dtype', 'bfloat16', '--rounds', '20', '--warmup', '5'),
    ],
    'Where the time goes': [
        *('--profile', 'apolynext_s', '--mode', 'train'),
        *('--batch', '8', '--dtype', 'bfloat16', '--rounds', '5', '--warmup', '5'),
    ],
}
SMALL_BENCHMARKS = {
    'Time and peak memory': [
        *('--models', 'cpolynext_t', 'apolynext_t', '--mode', 'train', '--memory'),
        *('--sizes', '64x64', '--rounds', '2', '--warmup', '1'),
    ],
}


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


def run_tests(results: Path, arguments: list[str]) -> tuple[list[str], bool]:
    """Run the tests marked cuda; return lines of the report, and whether all passed."""
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-m', 'cuda', '--tb=short', '-rs'),
            *(str(ROOT / 'tests' / 'cuda'), f'--junitxml={results}', *arguments),
        ],
        cwd=ROOT,
    )
    if not results.exists():
        return [f'pytest ended with {done.returncode} before it ran a test'], False
    cases = list(ET.parse(results).getroot().iter('testcase'))
    failed = [
        (case, outcome)
        for case in cases
        for outcome in (*case.findall('failure'), *case.findall('error'))
    ]
    skipped = [case for case in cases if case.find('skipped') is not None]
    lines = [
        f'{len(cases) - len(failed) - len(skipped)} passed, {len(failed)} failed, '
        f'{len(skipped)} skipped'
    ]
    for case, outcome in failed:
        message = (outcome.get('message') or '').splitlines()
        where = f'{case.get("classname")}::{case.get("name")}'
        lines.append(f'failed: `{where}`: {message[0] if message else "no message"}')
    reasons = [case.find('skipped').get('message') for case in skipped]
    for reason in dict.fromkeys(reasons):
        lines.append(f'skipped {reasons.count(reason)}: {reason}')
    return lines, done.returncode == 0


def run_benchmark(arguments: list[str]) -> tuple[str, bool]:
    """Return what benchmarks/run.py prints, and whether it succeeded."""
    program = ROOT / 'benchmarks' / 'run.py'
    done = subprocess.run(
        [sys.executable, str(program), '--device', DEVICE, *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-15:]
        return '\n'.join([f'failed with {done.returncode}:', '', '```', *last, '```']), False
    return done.stdout.strip().replace('\n## ', '\n### '), True


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
        'pytest', nargs='*', help='arguments of pytest, after --, such as -- -k attention'
    )
    args = parser.parse_args()
    if not is_available():
        print(
            f'skipped: torch {torch.__version__} finds no {DEVICE} device. On a machine with a '
            'GPU, see that nvidia-smi (or rocm-smi) lists it and that torch is a build for it'
        )
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = (args.out / 'tests.xml').absolute()
    results.unlink(missing_ok=True)
    sections = ['# PolyNeXt on a GPU', _bullets(machine())]
    outcome, good = run_tests(results, args.pytest)
    sections += ['## Tests', _bullets(outcome)]
    for title, arguments in (BENCHMARKS if DEVICE != 'cpu' else SMALL_BENCHMARKS).items():
        print(f'==> {title}', flush=True)
        printed, succeeded = run_benchmark(arguments)
        good &= succeeded
        sections += [f'## {title}', f'`benchmarks/run.py {" ".join(arguments)}`', printed]
    report = args.out / 'report.md'
    report.write_text('\n\n'.join(sections) + '\n')
    print(report.read_text())
    print(f'The report is in {report}: paste it into an issue')
    return 0 if good else 1


def _bullets(lines: list[str]) -> str:
    return '\n'.join(f'- {line}' for line in lines)


if __name__ == '__main__':
    sys.exit(main())
