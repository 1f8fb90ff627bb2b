"""Tables and plots of benchmarks/run.py."""

import csv
from pathlib import Path

# A row of a table: columns and their values, None where there is nothing to say.
Record = dict[str, str | float | None]


def markdown(records: list[Record]) -> str:
    """A table."""
    rows = [
        list(records[0]),
        ['---'] * len(records[0]),
        *([show(value) for value in record.values()] for record in records),
    ]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def show(value: str | float | None) -> str:
    """Four digits of a number."""
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


def plot_comparison(records: list[Record], path: Path) -> None:
    """Bars of the ratios to the baseline, one group a mode and size."""
    groups = list(dict.fromkeys(f'{r["mode"]} {r["size"]}' for r in records))
    models = list(dict.fromkeys(r['model'] for r in records))
    kinds = [
        kind for kind in ('time ratio', 'memory ratio') if any(r[kind] is not None for r in records)
    ] or ['time ratio']
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
    """Memory per token and time per pair of tokens, over tokens."""
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
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(6 * columns, 4), squeeze=False, layout='constrained'
    )
    return figure, axes[0]
