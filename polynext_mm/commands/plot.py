"""Draw the logs of one or several trainings: ``polynext-mm plot WORK_DIR ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from .arguments import UsageError
from .scalars import Point, Run, read_run

# The main metric of a run is the first of these that it has.
MAIN_METRICS = (
    'mIoU',
    'coco/bbox_mAP',
    'coco/segm_mAP',
    'pascal_voc/mAP',
    'coco/bbox_mAP_50',
)

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
        keys = args.keys or default_keys(runs)
        for key in keys:
            if not any(key in run.points for run in runs):
                known = sorted({key for run in runs for key in run.points})
                raise UsageError(f'--keys: no run has {key!r}; there is {", ".join(known)}')
        if args.by == 'epoch':
            for run in runs:
                if not any(point.epoch for points in run.points.values() for point in points):
                    raise UsageError(f'--by epoch: {run.name} counts iterations alone')
        draw(runs, keys, args)
    except (UsageError, ImportError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    print(args.out)
    return 0


def read_runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs that the command line names.

    Raises:
        UsageError: If a run cannot be read, or an option does not fit.
    """
    if args.names is not None and len(args.names) != len(args.runs):
        raise UsageError(f'--names has {len(args.names)} names for {len(args.runs)} runs')
    if args.smooth < 1:
        raise UsageError(f'--smooth must be at least 1, got {args.smooth}')
    if args.out.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--out must end in one of {", ".join(SUFFIXES)}, got {args.out}')
    names = args.names or [None] * len(args.runs)
    return [read_run(path, name) for path, name in zip(args.runs, names)]


def default_keys(runs: Sequence[Run]) -> list[str]:
    """Return loss, learning rate and the main metrics, as far as the runs have them."""
    keys = [key for key in ('loss', 'lr') if any(key in run.points for run in runs)]
    for run in runs:
        metric = next((key for key in MAIN_METRICS if key in run.metrics), None)
        metric = metric or next(iter(run.metrics), None)
        if metric is not None and metric not in keys:
            keys.append(metric)
    return keys


def draw(runs: Sequence[Run], keys: Sequence[str], args: argparse.Namespace) -> None:
    """Write a picture with a panel for every key and a line for every run.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from polynext_mm.compat.optional import require

    figures = require('matplotlib.figure')
    figure = figures.Figure(figsize=(4.5 * len(keys), 3.4), layout='constrained')
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for number, run in enumerate(runs):
            if key not in run.points:
                continue
            validates = key in run.metrics
            x, y = curve(run.points[key], args.by, 1 if validates else args.smooth)
            axis.plot(x, y, marker='.' if validates else '', color=f'C{number}', label=run.name)
        axis.set(xlabel=args.by, title=key)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        handles = [
            axis.plot([], [], color=f'C{number}', label=run.name)[0]
            for number, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc='outside lower center', ncols=min(4, len(runs)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


def curve(points: Sequence[Point], by: str, smooth: int) -> tuple[list[float], list[float]]:
    """Return x and y of a curve, y being the mean of the last ``smooth`` values."""
    points = [point for point in points if by == 'iteration' or point.epoch is not None]
    x = [getattr(point, by) for point in points]
    sums = [0.0, *accumulate(point.value for point in points)]
    starts = [max(0, end - smooth) for end in range(1, len(points) + 1)]
    y = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]
    return x, y
