"""Published accuracy against the time measured here, of PolyNeXt and its peers.

    python benchmarks/accuracy_against_time.py times.json --threads 2 --rounds 20
    python benchmarks/accuracy_against_time.py times.json --draw docs/images/accuracy_time.png
    python benchmarks/accuracy_against_time.py benchmarks/ade20k_times.json --task ade20k \\
        --threads 2 --rounds 5

The first command measures, and keeps what it has in times.json after every round: started again
with the same settings, it continues up to the given number of rounds. The second draws the
picture and prints the table from the file alone.

The networks of a task have random weights. They live in one process and take turns: in every round
each takes one step of inference and one of training, which is forward and backward without an
optimizer. Rounds go forward and backward through the list by turns. Times are medians, and ratios
medians of the ratios within a round.

    imagenet  Classifiers of one image of 224x224, at which their accuracy was published.
    ade20k    Segmentors: UperNet with 150 classes (benchmarks/segmentors.py), from an image of
              512x512 to the class of every pixel; training on two, with both losses.

All are in channels-last memory. docs/images/ade20k_time.png and tables in README.md and
docs/performance.md show benchmarks/ade20k_times.json; `make tables` writes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import segmentors
from measure import limit_memory, say, seconds
from polynext_mm.commands.arguments import positive
from polynext_mm.nn import ARCHS, PolyNeXtClassifier
from polynext_mm.weights.published import PUBLISHED
from report import Record, machine, markdown, new_figure
from subjects import DEVICES, DTYPES, Setting, check_device, make_step

MODES = ('inference', 'train')
TITLES = {'inference': 'inference', 'train': 'training step'}


class Network(NamedTuple):
    """A network with a published accuracy.

    Args:
        label: As it is shown.
        family: Networks of one are joined by a line.
        accuracy: Published, in percent: top-1 on ImageNet-1k, trained on it alone, without a
            teacher; or mIoU of UperNet on ADE20K after 160k iterations, at a single scale.
    """

    label: str
    family: str
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What networks are compared at.

    Args:
        networks: By the name that ``build`` takes.
        build: Returns a network without drop path.
        what: The kind of the networks.
        size: (H, W) of the images.
        batch: Images of a step in every mode.
        metric: Of the accuracy.
        axis: What the picture writes beside it.
        sources: Where the accuracies of a family were published.
        baseline: The network that others are related to, or None.
        elsewhere: Networks with a published accuracy whose code is not here.
        warm_up_at: Sizes for steps before the first round, of modes in which a step takes long.
    """

    networks: dict[str, Network]
    build: Callable[[str], nn.Module]
    what: str
    size: tuple[int, int]
    batch: dict[str, int]
    metric: str
    axis: str
    sources: dict[str, str]
    baseline: str | None = None
    elsewhere: tuple[Network, ...] = ()
    warm_up_at: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


OURS = ('CPolyNeXt', 'APolyNeXt')
#: In the order of their colours.
FAMILIES = (*OURS, 'ConvFormer', 'CAFormer', 'ConvNeXt', 'MambaOut', 'Swin')


def _classifiers() -> dict[str, Network]:
    """Return the networks by the name that builds them: an arch, or a model of timm."""
    networks = {}
    for arch in (f'{kind}polynext_{size}' for kind in 'ca' for size in 'tsbl'):
        family = f'{arch[0].upper()}PolyNeXt'
        label = f'{family}-{arch[-1].upper()}'
        networks[arch] = Network(label, family, PUBLISHED[arch].figure)
    for family, name, sizes, accuracies in (
        ('ConvFormer', 'convformer_{}', ('s18', 's36', 'm36'), (83.0, 84.1, 84.5)),
        ('CAFormer', 'caformer_{}', ('s18', 's36', 'm36'), (83.6, 84.5, 85.2)),
        ('ConvNeXt', 'convnext_{}', ('tiny', 'small', 'base'), (82.1, 83.1, 83.8)),
        ('MambaOut', 'mambaout_{}', ('tiny', 'small', 'base'), (82.7, 84.1, 84.2)),
        ('Swin', 'swin_{}_patch4_window7_224', ('tiny', 'small', 'base'), (81.2, 83.2, 83.5)),
    ):
        for size, accuracy in zip(sizes, accuracies):
            short = size.upper() if size[-1].isdigit() else size[0].upper()
            networks[name.format(size)] = Network(f'{family}-{short}', family, accuracy)
    return networks


def _classifier(name: str) -> nn.Module:
    """Return an arch of ours or a model of timm."""
    if name in ARCHS:
        return PolyNeXtClassifier(name)
    import timm

    return timm.create_model(name, drop_path_rate=0.0)


_METAFORMER = 'arXiv 2210.13452, as in github.com/sail-sg/metaformer'
_CONVNEXT = 'arXiv 2201.03545, as in github.com/facebookresearch/ConvNeXt'
_POLYNEXT = 'arXiv 2605.20839'
TASKS = {
    'imagenet': Task(
        networks=_classifiers(),
        build=_classifier,
        what='classifiers',
        size=(224, 224),
        batch=dict.fromkeys(MODES, 1),
        metric='top-1',
        axis='ImageNet top-1, %',
        sources={
            'CPolyNeXt': _POLYNEXT,
            'APolyNeXt': _POLYNEXT,
            'ConvFormer': _METAFORMER,
            'CAFormer': _METAFORMER,
            'ConvNeXt': _CONVNEXT,
            'MambaOut': 'arXiv 2405.07992, as in github.com/yuweihao/MambaOut',
            'Swin': 'github.com/microsoft/Swin-Transformer',
        },
    ),
    'ade20k': Task(
        networks={
            name: Network(label, label.partition('-')[0], accuracy)
            for name, label, accuracy in (
                ('cpolynext_s', 'CPolyNeXt-S', PUBLISHED['uper_cpolynexts'].figure),
                ('apolynext_s', 'APolyNeXt-S', PUBLISHED['uper_apolynexts'].figure),
                ('convformer_s18', 'ConvFormer-S18', 48.6),
                ('caformer_s18', 'CAFormer-S18', 48.9),
                ('convnext_tiny', 'ConvNeXt-T', 46.0),
                ('convnext_small', 'ConvNeXt-S', 48.7),
                ('swin_tiny', 'Swin-T', 44.5),
            )
        },
        build=segmentors.build,
        what='segmentors (UperNet)',
        size=(512, 512),
        batch={'inference': 1, 'train': 2},
        metric='mIoU',
        axis='ADE20K mIoU (UperNet), %',
        sources={
            **dict.fromkeys(('CPolyNeXt', 'APolyNeXt', 'ConvFormer', 'CAFormer'), _POLYNEXT),
            'ConvNeXt': _CONVNEXT,
            'Swin': 'github.com/SwinTransformer/Swin-Transformer-Semantic-Segmentation',
            'MogaNet': 'arXiv 2211.03295',
            'HorNet': 'arXiv 2207.14284',
            'VMamba': 'arXiv 2401.10166',
            'MambaVision': 'arXiv 2407.08083',
        },
        baseline='convformer_s18',
        elsewhere=(
            Network('MogaNet-S', 'MogaNet', 49.2),
            Network('HorNet-T', 'HorNet', 48.1),
            Network('VMamba-T', 'VMamba', 47.9),
            Network('MambaVision-T', 'MambaVision', 46.0),
        ),
        warm_up_at={'train': (64, 64)},
    ),
}


# Measuring


def measure(
    path: Path, task: str, names: Iterable[str], settings: list[Setting], rounds: int, warmup: int
) -> None:
    """Measure up to ``rounds`` rounds, those in the file included, and keep each in the file.

    Raises:
        ValueError: If the file holds times of another task, or of other networks or settings.
    """
    wanted = {
        'task': task,
        'networks': list(names),
        'settings': [dataclasses.asdict(s) | {'size': list(s.size)} for s in settings],
    }
    if path.exists():
        kept = read(path)
        different = [key for key, value in wanted.items() if kept[key] != value]
        if different:
            raise ValueError(
                f'{path} holds times of other {" and ".join(different)}: name another file, or '
                f'measure as it was done there ({", ".join(str(kept[key]) for key in different)})'
            )
    else:
        kept = wanted | {
            'environment': machine(settings[0]),
            'parameters': {},
            'seconds': {setting.mode: {name: [] for name in names} for setting in settings},
        }
    done = min(len(times) for of_mode in kept['seconds'].values() for times in of_mode.values())
    if done >= rounds:
        return
    steps, comparison = {}, TASKS[task]
    for name in names:
        say(f'{name}, warming up')
        model = comparison.build(name).to(settings[0].device, memory_format=torch.channels_last)
        kept['parameters'][name] = sum(parameter.numel() for parameter in model.parameters())
        for setting in settings:
            steps[setting.mode, name] = _in_mode(model, setting)
            size = comparison.warm_up_at.get(setting.mode, setting.size)
            warm_up = _in_mode(model, dataclasses.replace(setting, size=size))
            for _ in range(warmup):
                warm_up()
    for i in range(done, rounds):
        say(f'round {i + 1} of {rounds}')
        for mode, name in reversed(steps) if i % 2 else steps:
            taken = seconds(steps[mode, name], settings[0].device)
            kept['seconds'][mode][name].append(round(taken, 5))
        _write(path, kept)


def _in_mode(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """Return a step of a model that other steps put into another mode."""
    run = make_step(model, setting, 'channels_last')

    def step():
        model.train(setting.mode == 'train')
        run()

    return step


def _write(path: Path, kept: dict) -> None:
    partial = path.with_name(f'{path.name}.part')
    partial.write_text(json.dumps(kept, indent=1) + '\n')
    partial.replace(path)


def read(path: Path) -> dict:
    """Read what was measured.

    Raises:
        ValueError: If the file is none of this tool's.
    """
    try:
        kept = json.loads(path.read_text())
        TASKS[kept['task']], kept['networks'], kept['settings'], kept['environment']
        kept['parameters'], kept['seconds']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} holds no times of this tool ({error})') from None
    return kept


# The tables and the picture


def table(kept: dict) -> list[Record]:
    """Return a row for each network, the most accurate first where ratios are of interest.

    That is accuracy, medians and quartiles of the times in ms, and their ratios to the baseline.
    """
    task = TASKS[kept['task']]
    names = kept['networks']
    if task.baseline is not None:
        names = sorted(names, key=lambda name: -task.networks[name].accuracy)
    rows = []
    for name in names:
        network = task.networks[name]
        row: Record = {'network': network.label, task.metric: f'{network.accuracy:.1f}'}
        for mode, of_mode in kept['seconds'].items():
            first, middle, third = np.percentile(1e3 * np.asarray(of_mode[name]), [25, 50, 75])
            blank = ' ' * (mode == 'train')  # columns of one name
            row |= {
                f'{TITLES[mode]}, ms': float(middle),
                f'quartiles{blank}': f'{first:.0f} to {third:.0f}',
            }
            if task.baseline is not None:
                row[f'ratio{blank}'] = f'{ratios(kept, mode)[name]:.2f}'
        rows.append(row)
    return rows


def published(kept: dict) -> list[Record]:
    """Return a row for each network with a published accuracy, measured here or not."""
    task = TASKS[kept['task']]
    rows = []
    for name, network in [*task.networks.items(), *((None, other) for other in task.elsewhere)]:
        bold = '**' * (network.family in OURS)
        row: Record = {
            'backbone of UperNet': f'{bold}{network.label}{bold}',
            'parameters': f'{kept["parameters"][name] / 1e6:.0f} M' if name else '',
            task.metric: f'{bold}{network.accuracy:.1f}{bold}',
        }
        for mode in kept['seconds']:
            row[TITLES[mode]] = f'{ratios(kept, mode)[name]:.2f}' if name else ''
        rows.append(row)
    return sorted(rows, key=lambda row: -float(str(row[task.metric]).strip('*')))


def medians(kept: dict, mode: str) -> dict[str, float]:
    """Return the median of every network in milliseconds."""
    return {name: 1e3 * statistics.median(t) for name, t in kept['seconds'][mode].items()}


def ratios(kept: dict, mode: str) -> dict[str, float]:
    """Return the median of every network's ratios to the baseline within a round."""
    times = kept['seconds'][mode]
    baseline = times[TASKS[kept['task']].baseline]
    return {
        name: statistics.median(time / base for time, base in zip(of_one, baseline))
        for name, of_one in times.items()
    }


def above_our_line(kept: dict, mode: str) -> list[str]:
    """Return the peers that are more accurate than PolyNeXt is in their time.

    That is read off straight lines between the points of the picture, of the PolyNeXt that no other
    PolyNeXt beats. Left of the fastest and right of the slowest of these, their own accuracy
    counts.
    """
    times, networks = medians(kept, mode), TASKS[kept['task']].networks
    best = sorted((times[n], networks[n].accuracy) for n in times if networks[n].family in OURS)
    line = []
    for time, accuracy in best:
        if not line or accuracy > line[-1][1]:
            line.append((time, accuracy))
    if not line:
        return []
    x, y = np.log([t for t, _ in line]), [a for _, a in line]
    return [
        networks[name].label
        for name, time in times.items()
        if networks[name].family not in OURS
        and networks[name].accuracy > np.interp(np.log(time), x, y)
    ]


def conditions(kept: dict) -> str:
    """Return in a line what was measured, and how often."""
    setting = kept['settings'][0]
    rounds = min(len(times) for of_mode in kept['seconds'].values() for times in of_mode.values())
    batches = ', '.join(f'{TITLES[s["mode"]]} of {s["batch"]}' for s in kept['settings'])
    return (
        f'{rounds} interleaved rounds, {TASKS[kept["task"]].what} at '
        f'{"x".join(map(str, setting["size"]))}, {batches}, {setting["dtype"]}, '
        f'{setting["threads"]} threads, {setting["device"]}'
    )


def summary(kept: dict) -> str:
    """Return the report: conditions, table, sources, and who is above our line."""
    task = TASKS[kept['task']]
    lines = [conditions(kept), kept['environment'], markdown(table(kept))]
    for mode in kept['seconds']:
        above = above_our_line(kept, mode)
        lines.append(f"Peers above PolyNeXt's line, {TITLES[mode]}: {', '.join(above) or 'none'}.")
    networks = [*(task.networks[name] for name in kept['networks']), *task.elsewhere]
    families = dict.fromkeys(network.family for network in networks)
    lines.append('Accuracies: ' + '; '.join(f'{f}: {task.sources[f]}' for f in families) + '.')
    return '\n\n'.join(lines)


def draw(kept: dict, path: Path) -> None:
    """Draw accuracy over time, in a panel for each mode."""
    task, modes = TASKS[kept['task']], list(kept['seconds'])
    figure, axes = new_figure(len(modes))
    for axis, mode in zip(axes, modes):
        times = medians(kept, mode)
        for family in dict.fromkeys(task.networks[name].family for name in times):
            _draw_family(axis, task, family, times)
        if task.baseline is None:
            _scale_for_many_sizes(axis, times.values())
        else:
            _scale_for_one_size(axis, task, times)
        unit, size = ('ms', None) if task.baseline is None else ('seconds', 13)
        axis.set_xlabel(f'{unit}, {TITLES[mode]}', fontsize=size)
        axis.set_ylabel(task.axis, fontsize=size)
        axis.grid(alpha=0.3)
    if task.baseline is None:
        axes[0].legend(fontsize=8, loc='lower right')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={'Source': digest(kept)})


def digest(kept: dict) -> str:
    """Return what tells whether a picture shows this."""
    shown = [markdown(table(kept)), [list(other) for other in TASKS[kept['task']].elsewhere]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _draw_family(axis, task: Task, family: str, times: dict[str, float]) -> None:
    """Draw the points of a family, joined, with their names, or with their sizes alone."""
    names = [name for name in times if task.networks[name].family == family]
    x = [times[name] for name in names]
    y = [task.networks[name].accuracy for name in names]
    ours = family in OURS
    axis.plot(
        x,
        y,
        color=f'C{FAMILIES.index(family)}',
        marker='o' if ours else 's',
        markersize=6 if ours else 4,
        linewidth=2.2 if ours else 1,
        linestyle='-' if ours else '--',
        zorder=3 if ours else 2,
        label=family,
    )
    if task.baseline is None:
        for name, left, top in zip(names, x, y):
            size = task.networks[name].label.rpartition('-')[2]
            axis.annotate(size, (left, top), (3, -10), textcoords='offset points', fontsize=7)


def _scale_for_many_sizes(axis, times: Iterable[float]) -> None:
    axis.set_xscale('log')
    ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
    low, high = min(times) / 1.2, max(times) * 1.2
    axis.set_xticks([t for t in ticks if low < t < high], minor=False)
    axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axis.xaxis.set_minor_formatter(lambda value, _: '')
    axis.set_xlim(low, high)


def _scale_for_one_size(axis, task: Task, times: dict[str, float]) -> None:
    """Start at 0, with the names in a column at the right, and at the left what is not measured."""
    networks = [task.networks[name] for name in times]
    accuracies = [network.accuracy for network in (*networks, *task.elsewhere)]
    right = 1.1 * max(times.values())
    axis.set_xlim(0, 1.65 * right)
    axis.set_ylim(min(accuracies) - 0.5, max(accuracies) + 0.5)
    axis.xaxis.set_major_formatter(lambda value, _: f'{value / 1e3:g}')
    axis.tick_params(labelsize=11)
    for network, time, height in zip(networks, times.values(), _apart(networks, 0.5)):
        axis.annotate(
            f'{network.label}  {network.accuracy:.1f}',
            (time, network.accuracy),
            (right, height),
            va='center',
            fontsize=12,
            weight='bold' if network.family in OURS else 'normal',
            arrowprops=dict(
                arrowstyle='-', color='gray', linewidth=0.6, relpos=(0, 0.5), shrinkA=1, shrinkB=4
            ),
        )
    for network, height in zip(task.elsewhere, _apart(task.elsewhere, 0.35)):
        axis.plot([0, 0.015 * right], [network.accuracy] * 2, color='gray', linewidth=1)
        label = f'{network.label}  {network.accuracy:.1f}, not timed'
        axis.text(0.03 * right, height, label, va='center', fontsize=9, color='gray')


def _apart(networks: Sequence[Network], distance: float) -> list[float]:
    """Return heights for the names of networks, which do not overlap, in their order."""
    heights: dict[str, float] = {}
    lowest = math.inf
    for network in sorted(networks, key=lambda network: -network.accuracy):
        lowest = heights[network.label] = min(network.accuracy, lowest - distance)
    return [heights[network.label] for network in networks]


# The command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('times', type=Path, help='the JSON file of the times')
    parser.add_argument(
        '--draw', type=Path, metavar='PICTURE', help='draw the file, and measure nothing'
    )
    parser.add_argument('--task', choices=TASKS, default='imagenet')
    parser.add_argument(
        '--networks',
        nargs='+',
        metavar='NAME',
        help='of imagenet: '
        + '; of ade20k: '.join(', '.join(task.networks) for task in TASKS.values())
        + ' (default: all)',
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument('--rounds', type=positive, default=20)
    parser.add_argument('--warmup', type=positive, default=1, help='steps before the first round')
    parser.add_argument('--batch', type=positive, help="instead of the task's")
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='half types by autocast')
    parser.add_argument('--device', choices=DEVICES, default='cpu')
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    args = parser.parse_args()
    networks = TASKS[args.task].networks
    args.networks = args.networks or list(networks)
    unknown = [name for name in args.networks if name not in networks]
    if unknown:
        parser.error(f'{args.task} has no {", ".join(unknown)}: choose of {", ".join(networks)}')
    return args


def main() -> None:
    args = parse_args()
    try:
        if args.draw is None:
            check_device(args.device)
            torch.set_num_threads(args.threads)
            limit_memory(args.device)
            task = TASKS[args.task]
            settings = [
                Setting(
                    mode,
                    task.size,
                    args.batch or task.batch[mode],
                    args.dtype,
                    args.device,
                    args.threads,
                )
                for mode in args.modes
            ]
            measure(args.times, args.task, args.networks, settings, args.rounds, args.warmup)
        kept = read(args.times)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    print(summary(kept))
    if args.draw is not None:
        draw(kept, args.draw)


if __name__ == '__main__':
    main()
