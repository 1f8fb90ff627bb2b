"""Train and evaluate on a sample: ``polynext-mm demo [segmentation|detection]``, in a clone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from polynext_mm.resources import folder

from .run import run_script


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm demo',
        description='Train and evaluate on a sample, in minutes on a CPU; writes to work_dirs/. '
        'Needs a clone of the repository: the sample is not part of the wheel',
    )
    parser.add_argument(
        'task',
        nargs='?',
        choices=['segmentation', 'detection'],
        default='segmentation',
        help='default: %(default)s',
    )
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='what the demo gets')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        script = folder('demo') / f'{args.task}.py'
    except FileNotFoundError as error:
        sys.exit(f'{error}: run `make demo` in a clone')
    return run_script(script, args.arguments)
