"""Training logs: what mmengine's LocalVisBackend writes into vis_data/scalars.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_FILE = 'vis_data/scalars.json'


class ScalarsError(ValueError):
    """There is no log of a training, or it is not mmengine's."""


@dataclass(frozen=True)
class Point:
    """A value at a point in training.

    Args:
        iteration: Iteration, counted over the whole training.
        epoch: Epoch; None in a training without epochs.
        value: The value.
    """

    iteration: int
    epoch: float | None
    value: float


@dataclass
class Run:
    """A training, resumed or not: its points by the name of the scalar.

    Args:
        name: For legends.
        points: In the order of training.
        metrics: Names of scalars of validation.
    """

    name: str
    points: dict[str, list[Point]] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)


@dataclass
class _Record:
    iteration: int
    epoch: float | None
    values: dict[str, float]
    validates: bool


def read_run(path: Path, name: str | None = None) -> Run:
    """Read a training.

    Args:
        path: A work dir, whose starts are joined, with later values replacing earlier ones for the
            same steps; or the folder of a single start; or a scalars.json.
        name: Name for legends; by default that of the work dir.

    Raises:
        ScalarsError: If there are no such files, or one was not written by mmengine.
    """
    files = _files(path)
    records: list[_Record] = []
    for file in files:
        _join(records, list(_records(file)))
    if not records:
        raise ScalarsError(f'{path} has no scalars yet')
    per_epoch = max((r.iteration / r.epoch for r in records if r.epoch), default=None)
    run = Run(name or _name(path))
    for record in records:
        epoch = record.epoch
        if per_epoch is not None and not (record.validates and epoch):
            epoch = record.iteration / per_epoch
        for key, value in record.values.items():
            run.points.setdefault(key, []).append(Point(record.iteration, epoch, value))
            if record.validates and key not in run.metrics:
                run.metrics.append(key)
    return run


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # the folder of each start is named after its time
    found = sorted(path.glob(f'*/{_FILE}')) or sorted(path.glob(_FILE))
    found = found or sorted(path.glob('scalars.json'))
    if not found:
        raise ScalarsError(f'{path} is not a work dir with a training log: it has no */{_FILE}')
    return found


def _name(path: Path) -> str:
    path = path.resolve()
    parts = [part for part in path.parts if part not in ('vis_data', 'scalars.json')]
    return parts[-1]


def _records(file: Path) -> Iterator[_Record]:
    """Yield a start's records, in the order in which they were written."""
    lines = file.read_text(encoding='utf-8').splitlines()
    iteration, epoch = 0, None
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            step = content.pop('step')
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):  # the run was killed, or is still writing this line
                return
            raise ScalarsError(f'{file}, line {number}: not a record of mmengine') from error
        numbers = {
            key: float(value)
            for key, value in content.items()
            if isinstance(value, (int, float)) and key not in ('iter', 'epoch')
        }
        if 'iter' in content:
            iteration, epoch = content['iter'], content.get('epoch')
            yield _Record(iteration, epoch, numbers, False)
        else:
            # The step of a validation counts iterations or epochs.
            counts_epochs = step == epoch or step < iteration
            values = {key: v for key, v in numbers.items() if key not in ('time', 'data_time')}
            yield _Record(
                iteration if counts_epochs else step, step if counts_epochs else None, values, True
            )


def _join(records: list[_Record], more: list[_Record]) -> None:
    """Append a later start's records, which replace earlier ones for the same iterations."""
    first = next((record.iteration for record in more if not record.validates), None)
    if first is not None:
        records[:] = [record for record in records if record.iteration < first]
    records += more
