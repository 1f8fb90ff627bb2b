"""Draw the logs of one or more trainings: ``polynext-mm plot WORK_DIR ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm import figures
from polynext_mm.scalars import Run, ScalarsError, read_run

from .arguments import UsageError

SUFFIXES = ('.jpeg', '.jpg', '.pdf', '.png', '.svg', '.webp')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm plot',
        description='Draw loss, learning rate and validation of trainings, resumed ones joined',
    )
    parser.add_argument(
        'runs', nargs='+', type=Path, metavar='RUN', help='a work dir, or a scalars.json'
    )
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='default: %(default)s')
    parser.add_argument(
        '--keys',
        nargs='+',
        metavar='KEY',
        help='scalars to draw (default: loss, lr, and mIoU or AP)',
    )
    parser.add_argument('--names', nargs='+', metavar='NAME', help='of the runs, for the legend')
    parser.add_argument('--by', choices=['iteration', 'epoch'], default='iteration')
    parser.add_argument(
        '--smooth',
        type=int,
        default=1,
        metavar='N',
        help='draw the mean of N logged values of training (default: 1)',
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        runs = read_runs(args)
        keys = args.keys or figures.default_keys(runs)
        for key in keys:
            if not any(key in run.points for run in runs):
                known = sorted({key for run in runs for key in run.points})
                raise UsageError(f'--keys: no run has {key!r}; there is {", ".join(known)}')
        if args.by == 'epoch':
            for run in runs:
                if not any(point.epoch for points in run.points.values() for point in points):
                    raise UsageError(f'--by epoch: {run.name} counts iterations alone')
        figures.curves(runs, keys, args.out, args.by, args.smooth)
    except (UsageError, ScalarsError, ImportError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    print(args.out)
    return 0


def read_runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the command line names.

    Raises:
        UsageError: If an option does not apply.
        ScalarsError: If a run cannot be read.
    """
    if args.names is not None and len(args.names) != len(args.runs):
        raise UsageError(f'--names has {len(args.names)} names for {len(args.runs)} runs')
    if args.smooth < 1:
        raise UsageError(f'--smooth must be at least 1, got {args.smooth}')
    if args.out.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--out must end in one of {", ".join(SUFFIXES)}, got {args.out}')
    names = args.names or [None] * len(args.runs)
    return [read_run(path, name) for path, name in zip(args.runs, names)]
