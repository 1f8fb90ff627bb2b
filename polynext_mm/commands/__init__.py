"""The command ``polynext-mm``, also ``python -m polynext_mm``.

Each command is a module of this folder with ``main(argv)`` and, except ``benchmark``, a
``build_parser()``, and is imported only when used. ``tools/`` has scripts with the names that mm
users expect, which call the same functions.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from polynext_mm.compat.packages import MissingPackageError
from polynext_mm.written import REFUSALS

#: The module of every command, and what the command does in one line.
COMMANDS: dict[str, tuple[str, str]] = {
    'new': ('new', 'write the config of a training on a folder of yours'),
    'train': ('train', 'train a segmentor or a detector'),
    'test': ('test', 'evaluate a segmentor (mIoU) or a detector (COCO AP)'),
    'predict': ('predict', "draw a model's predictions into images"),
    'check-dataset': ('check_dataset', 'read a data set once and say what is wrong with it'),
    'convert-dataset': ('convert_dataset', 'annotations of other formats as mm reads them'),
    'convert': ('convert', "translate a checkpoint's names to ours, or to the authors'"),
    'export': ('export', 'write a model as ONNX, or as a program of torch.export'),
    'validate-imagenet': (
        'validate_imagenet',
        'measure a classifier on ImageNet, and its robustness',
    ),
    'flops': ('flops', "count parameters and multiply-adds of a config's model"),
    'benchmark': ('benchmark', 'measure time and memory beside peers'),
    'demo': ('demo', 'train and evaluate on a sample, in minutes on a CPU'),
    'plot': ('plot', 'draw the logs of one or several trainings'),
    'download': ('download', 'download published files to where configs look for them'),
    'list': ('list_all', 'list archs, configs and published files'),
    'config': ('config', 'print a config with all that it inherits, or its path'),
    'doctor': ('doctor', 'say what is installed and what works, for bug reports'),
    'run': ('run', "run a script of mm's with polynext_mm imported first"),
    'timm': ('timm_script', 'run a script on top of timm that can then create a PolyNeXt'),
}


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    lines = [f'  {name:<{width}}{text}' for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog='polynext-mm',
        description='PolyNeXt for OpenMMLab: train, evaluate and look at segmentors and detectors.',
        epilog='commands:\n' + '\n'.join(lines) + '\n\n`polynext-mm COMMAND --help` says more.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='polynext-mm [-h] [--version] COMMAND ...',
    )
    parser.add_argument('--version', action='store_true', help='print the version and exit')
    parser.add_argument('command', nargs='?', help=argparse.SUPPRESS)
    return parser


def _print_any_name() -> None:
    """Let file names be printed that the output's encoding cannot represent."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == 'strict':
        sys.stdout.reconfigure(errors='backslashreplace')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        module, _ = COMMANDS[argv[0]]
        _print_any_name()
        try:
            return importlib.import_module(f'.{module}', __name__).main(argv[1:])
        except MissingPackageError as error:
            sys.exit(str(error))
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            sys.exit(f'{type(error).__name__}: {error}')
    parser = build_parser()
    args, _ = parser.parse_known_args(argv)
    if args.version:
        print(importlib.import_module('polynext_mm').__version__)
        return 0
    if args.command is not None:
        parser.error(f'there is no command {args.command!r}: it is one of {", ".join(COMMANDS)}')
    parser.print_help()
    return 2
