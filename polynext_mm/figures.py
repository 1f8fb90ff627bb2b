"""Figures made with matplotlib: training curves and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .compat.optional import require
from .scalars import Point, Run

# The main metric of a run is the first of these that it has.
MAIN_METRICS = (
    'mIoU',
    'coco/bbox_mAP',
    'coco/segm_mAP',
    'pascal_voc/mAP',
    'coco/bbox_mAP_50',
)
_NUMBERED = 20  # with more classes, a confusion matrix shows shares by colour only


def default_keys(runs: Sequence[Run]) -> list[str]:
    """Return loss, learning rate and the main metrics, if the runs have them."""
    keys = [key for key in ('loss', 'lr') if any(key in run.points for run in runs)]
    for run in runs:
        metric = next((key for key in MAIN_METRICS if key in run.metrics), None)
        metric = metric or next(iter(run.metrics), None)
        if metric is not None and metric not in keys:
            keys.append(metric)
    return keys


def curves(
    runs: Sequence[Run], keys: Sequence[str], out: Path, by: str = 'iteration', smooth: int = 1
) -> None:
    """Write a picture with a panel for every key and a line for every run.

    Args:
        runs: The trainings.
        keys: Names of scalars.
        out: The file to write; its folder is created.
        by: 'iteration' or 'epoch'.
        smooth: How many logged training values to average for each point.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(4.5 * len(keys), 3.4)
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for number, run in enumerate(runs):
            if key not in run.points:
                continue
            validates = key in run.metrics
            x, y = curve(run.points[key], by, 1 if validates else smooth)
            axis.plot(x, y, marker='.' if validates else '', color=f'C{number}', label=run.name)
        axis.set(xlabel=by, title=key)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        handles = [
            axis.plot([], [], color=f'C{number}', label=run.name)[0]
            for number, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc='outside lower center', ncols=min(4, len(runs)))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def curve(points: Sequence[Point], by: str, smooth: int) -> tuple[list[float], list[float]]:
    """Return x and y of a curve, y being the mean of the last ``smooth`` values."""
    points = [point for point in points if by == 'iteration' or point.epoch is not None]
    x = [getattr(point, by) for point in points]
    sums = [0.0, *accumulate(point.value for point in points)]
    starts = [max(0, end - smooth) for end in range(1, len(points) + 1)]
    y = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]
    return x, y


def confusion(counts: np.ndarray, classes: Sequence[str], title: str, out: Path) -> None:
    """Write a picture of the share of each class's pixels that was predicted as each class.

    Args:
        counts: Pixels, (true class, predicted class).
        classes: Names of the classes.
        title: Of the picture.
        out: The file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(20.0, 3 + 0.45 * len(classes))
    figure = _figure(side, side)
    axis = figure.subplots()
    axis.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    size = 9 if len(classes) <= _NUMBERED else 6
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axis.set_yticks(range(len(classes)), classes, fontsize=size)
    axis.set(xlabel='predicted', ylabel='truth')
    axis.set_title(title, fontsize=10)
    for true, predicted in np.argwhere(shares >= 0.005) if len(classes) <= _NUMBERED else ():
        share = shares[true, predicted]
        colour = 'white' if share > 0.5 else 'black'
        axis.text(
            predicted, true, f'{share:.0%}', ha='center', va='center', color=colour, fontsize=8
        )
    figure.savefig(out, dpi=100)


def _figure(width: float, height: float) -> Any:
    return require('matplotlib.figure').Figure(figsize=(width, height), layout='constrained')
