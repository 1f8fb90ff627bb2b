"""The report of benchmarks/run.py: text, tables, plots, and doubts about them."""

from __future__ import annotations

import contextlib
import csv
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Union

from measure import Result
from polynext_mm.compat.torch_features import device_module
from subjects import Setting

# A row of a table: columns and their values, None where there is no value.
Record = dict[str, Union[str, float, None]]
# Draws records into a file.
Plot = Callable[[list[Record], Path], None]

BUSY_LOAD = 0.5  # per core, from other processes
NOISY_SPREAD = 0.1  # interquartile range over median
MIB = 1 << 20


class Report:
    """Print sections as they come, and keep them in a folder.

    Args:
        folder: Gets results.md with all sections, and tables and plots; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.sections = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        print(text, end='\n\n', flush=True)
        self.sections.append(text)
        if self.folder is not None:
            (self.folder / 'results.md').write_text('\n\n'.join(self.sections) + '\n')

    def add_results(
        self, title: str, records: list[Record], results: list[Result], name: str, plot: Plot
    ) -> None:
        """Add a table with notes on it, and keep it as NAME.csv and drawn as NAME.png."""
        self.add(f'## {title}\n\n{markdown(records)}\n\n{notes(results)}')
        if self.folder is not None:
            write_csv(records, self.folder / f'{name}.csv')
            plot(records, self.folder / f'{name}.png')


# Text


def environment(setting: Setting, rounds: int, warmup: int) -> str:
    """List what the figures depend on, and whether the machine is busy with something else."""
    return (
        f'- {setting.dtype}, batch {setting.batch}, {rounds} interleaved rounds after {warmup} '
        f'warm-up steps, on {setting.device}\n{machine(setting)}'
    )


def machine(setting: Setting) -> str:
    """List what the figures depend on besides their setting."""
    cores, load = os.cpu_count() or 1, os.getloadavg()
    lines = [
        ', '.join(f'{name} {_version(name)}' for name in ('torch', 'timm', 'polynext-mm')),
        f'{_cpu_name()}, {cores} cores, {setting.threads} threads used',
        'load average before: {:.2f} {:.2f} {:.2f}'.format(*load),
    ]
    module = device_module(setting.device)
    if hasattr(module, 'get_device_name'):
        lines.append(module.get_device_name())
    if load[0] > BUSY_LOAD * cores:
        lines.append(
            f'**WARNING: the machine is busy (load {load[0]:.2f} on {cores} cores): '
            'do not trust the times**'
        )
    return _bullets(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def notes(results: list[Result]) -> str:
    """List what to know before believing a table."""
    lines = []
    spreads = [result.spread for result in results if result.times]
    if spreads:
        lines.append(
            f'Largest spread of the times (interquartile range / median): {max(spreads):.1%}.'
        )
    for result in results:
        if not result.times:
            lines.append(f'{result.name}: did not fit into memory.')
        elif result.spread > NOISY_SPREAD:
            lines.append(
                f'**WARNING: {result.name}: spread {result.spread:.1%}: measure again on a '
                'quieter machine, or with more rounds.**'
            )
        if result.method is not None and result.peak is None:
            lines.append(f'{result.name}: no peak memory: {result.method}.')
    methods = {result.method for result in results if result.peak is not None}
    if methods:
        lines.append(
            'Peak memory: weights, gradients, activations and scratch space of a step, in '
            f'a process of its own, by {", ".join(sorted(methods))}.'
        )
    return _bullets(lines)


def _bullets(lines: list[str]) -> str:
    return '\n'.join(f'- {line}' for line in lines)


# Tables


def comparison(result: Result, baseline: Result) -> Record:
    """Return the row of a model: times, peak memory, and their ratios to a baseline."""
    return {
        'mode': result.setting.mode,
        'size': result.setting.shown_size,
        'model': result.subject.label,
        'memory format': result.subject.memory_format,
        **_times(result),
        'time ratio': result.time_ratio(baseline),
        'peak MiB': result.peak and result.peak / MIB,
        'memory ratio': result.memory_ratio(baseline),
    }


def attention_costs(result: Result) -> Record:
    """Return the row of a form of attention, costs being those of all heads together."""
    (tokens,) = result.setting.size
    count = result.setting.batch * tokens
    return {
        'tokens': result.setting.shown_size,
        'form': result.subject.label,
        **_times(result),
        'ns per pair': result.median and 1e9 * result.median / (count * tokens),
        'peak MiB': result.peak and result.peak / MIB,
        'bytes per token': result.peak and result.peak / count,
    }


def _times(result: Result) -> Record:
    first, third = result.quartiles if result.times else (None, None)
    times = {'median ms': result.median, 'q1 ms': first, 'q3 ms': third}
    return {column: time and 1e3 * time for column, time in times.items()}


def markdown(records: list[Record]) -> str:
    """Format records as a table."""
    rows = [
        list(records[0]),
        ['---'] * len(records[0]),
        *([_shown(value) for value in record.values()] for record in records),
    ]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _shown(value: str | float | None) -> str:
    """Format a number with four digits."""
    if value is None:
        return '-'
    if isinstance(value, str):
        return value
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def write_csv(records: list[Record], path: Path) -> None:
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


# Plots


def plot_comparison(records: list[Record], path: Path) -> None:
    """Draw bars of the ratios to the baseline, grouped by mode and size."""
    groups = list(dict.fromkeys(f'{r["mode"]} {r["size"]}' for r in records))
    models = list(dict.fromkeys(r['model'] for r in records))
    measured = {kind for r in records for kind, value in r.items() if value is not None}
    kinds = ['time ratio', *({'memory ratio'} & measured)]
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        for i, model in enumerate(models):
            heights = [r[kind] or 0 for r in records if r['model'] == model]
            left = [group + 0.8 * (i / len(models) - 0.5) for group in range(len(groups))]
            axis.bar(left, heights, 0.8 / len(models), align='edge', label=model)
        axis.set_xticks(range(len(groups)), groups)
        axis.axhline(1, color='black', linewidth=0.5)
        axis.set_title(f'{kind} to the baseline')
        axis.legend()
    figure.savefig(path)


def plot_attention(records: list[Record], path: Path) -> None:
    """Draw memory per token and time per pair of tokens over the number of tokens."""
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, ('bytes per token', 'ns per pair')):
        for form in dict.fromkeys(r['form'] for r in records):
            points = [
                (int(r['tokens']), r[kind])
                for r in records
                if r['form'] == form and r[kind] is not None
            ]
            axis.plot([x for x, _ in points], [y for _, y in points], marker='o', label=form)
        axis.set_xscale('log', base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel('tokens')
        axis.set_title(kind)
        axis.legend()
    figure.savefig(path)


def new_figure(columns: int):
    """Return a figure and its axes, side by side."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(6 * columns, 4), squeeze=False, layout='constrained'
    )
    return figure, axes[0]
