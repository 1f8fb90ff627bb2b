"""Published ImageNet accuracy against the time measured here, of PolyNeXt and its peers.

    python benchmarks/accuracy_against_time.py times.json --threads 2 --rounds 20
    python benchmarks/accuracy_against_time.py times.json --draw docs/images/accuracy_time.png

The first command measures, and keeps what it has in times.json after every round: started again
with the same settings, it continues up to the given number of rounds. The second draws the
picture and prints the table from the file alone.

All networks are classifiers at 224x224, at which their accuracy was published, in channels-last
memory, with random weights. They live in one process and take turns: in every round each takes one
step of inference and one of training, which is forward and backward without an optimizer. Rounds go
forward and backward through the list by turns. Times are medians.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from measure import limit_memory, say, seconds
from polynext_mm.commands.arguments import positive
from polynext_mm.nn import ARCHS, PolyNeXtClassifier
from polynext_mm.weights.published import PUBLISHED
from report import Record, environment, markdown, new_figure
from subjects import DEVICES, DTYPES, Setting, autocast, check_device

SIZE = (224, 224)
MODES = ('inference', 'train')
TITLES = {'inference': 'inference', 'train': 'training step'}


class Network(NamedTuple):
    """A classifier.

    Args:
        label: As it is shown.
        family: Networks of one are joined by a line.
        accuracy: Published top-1 on ImageNet-1k in percent, trained on it alone, without a teacher.
    """

    label: str
    family: str
    accuracy: float


_METAFORMER = 'arXiv 2210.13452, as in github.com/sail-sg/metaformer'
_CONVNEXT = 'arXiv 2201.03545, as in github.com/facebookresearch/ConvNeXt'
_MAMBAOUT = 'arXiv 2405.07992, as in github.com/yuweihao/MambaOut'
_SWIN = 'github.com/microsoft/Swin-Transformer'
#: Where the accuracies of a family were published.
SOURCES = {
    'CPolyNeXt': 'arXiv 2605.20839',
    'APolyNeXt': 'arXiv 2605.20839',
    'ConvFormer': _METAFORMER,
    'CAFormer': _METAFORMER,
    'ConvNeXt': _CONVNEXT,
    'MambaOut': _MAMBAOUT,
    'Swin': _SWIN,
}
OURS = ('CPolyNeXt', 'APolyNeXt')


def _networks() -> dict[str, Network]:
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


NETWORKS = _networks()


# Measuring


def build(name: str) -> nn.Module:
    """Return a classifier without drop path: an arch of ours or a model of timm."""
    if name in ARCHS:
        model = PolyNeXtClassifier(name)
    else:
        import timm

        model = timm.create_model(name, drop_path_rate=0.0)
    return model.to(memory_format=torch.channels_last)


def make_step(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """Return a step of a model, which is on the device of the setting."""
    images = torch.randn(setting.batch, 3, *setting.size, device=setting.device)
    images = images.contiguous(memory_format=torch.channels_last)
    train = setting.mode == 'train'

    def step():
        model.train(train)
        with torch.set_grad_enabled(train), autocast(setting):
            logits = model(images)
        if train:
            logits.float().mean().backward()
            model.zero_grad(set_to_none=True)

    return step


def measure(path: Path, names: Iterable[str], settings: list[Setting], rounds: int, warmup: int):
    """Measure up to ``rounds`` rounds, those in the file included, and keep each in the file.

    Raises:
        ValueError: If the file holds times of other networks or settings.
    """
    conditions = dataclasses.asdict(settings[0]) | {'size': list(SIZE)}
    conditions['mode'] = [setting.mode for setting in settings]
    wanted = {'networks': list(names), 'settings': conditions}
    if path.exists():
        kept = read(path)
        different = [key for key, value in wanted.items() if kept[key] != value]
        if different:
            raise ValueError(
                f'{path} holds times of other {" and ".join(different)}: name another file, or '
                f'measure as it was done there ({", ".join(str(kept[key]) for key in different)})'
            )
    else:
        about = environment(settings[0], rounds, warmup)
        kept = wanted | {
            'environment': about,
            'seconds': {
                setting.mode: {name: [] for name in wanted['networks']} for setting in settings
            },
        }
    done = min(len(times) for of_mode in kept['seconds'].values() for times in of_mode.values())
    if done >= rounds:
        return
    steps = {}
    for name in wanted['networks']:
        say(f'{name}, warming up')
        model = build(name).to(settings[0].device)
        for setting in settings:
            step = steps[setting.mode, name] = make_step(model, setting)
            for _ in range(warmup):
                step()
    for i in range(done, rounds):
        say(f'round {i + 1} of {rounds}')
        for mode, name in reversed(steps) if i % 2 else steps:
            kept['seconds'][mode][name].append(seconds(steps[mode, name], settings[0].device))
        _write(path, kept)


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
        kept['networks'], kept['settings'], kept['seconds'], kept['environment']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} holds no times of this tool ({error})') from None
    return kept


# The table and the picture


def table(kept: dict) -> list[Record]:
    """Return a row for each network: accuracy, and medians and quartiles of the times in ms."""
    rows = []
    for name in kept['networks']:
        row: Record = {'network': NETWORKS[name].label, 'top-1': f'{NETWORKS[name].accuracy:.1f}'}
        for mode, of_mode in kept['seconds'].items():
            times = 1e3 * np.asarray(of_mode[name])
            first, middle, third = np.percentile(times, [25, 50, 75])
            row |= {
                f'{TITLES[mode]}, ms': float(middle),
                'quartiles' + ' ' * (mode == 'train'): f'{first:.0f} to {third:.0f}',
            }
        rows.append(row)
    return rows


def medians(kept: dict, mode: str) -> dict[str, float]:
    """Return the median of every network in milliseconds."""
    return {name: 1e3 * statistics.median(t) for name, t in kept['seconds'][mode].items()}


def above_our_line(kept: dict, mode: str) -> list[str]:
    """Return the peers that are more accurate than PolyNeXt is in their time.

    That is read off straight lines between the points of the picture, of the PolyNeXt that no other
    PolyNeXt beats. Left of the fastest and right of the slowest of these, their own accuracy
    counts.
    """
    times = medians(kept, mode)
    best = sorted((times[n], NETWORKS[n].accuracy) for n in times if NETWORKS[n].family in OURS)
    line = []
    for time, accuracy in best:
        if not line or accuracy > line[-1][1]:
            line.append((time, accuracy))
    if not line:
        return []
    x, y = np.log([t for t, _ in line]), [a for _, a in line]
    return [
        NETWORKS[name].label
        for name, time in times.items()
        if NETWORKS[name].family not in OURS
        and NETWORKS[name].accuracy > np.interp(np.log(time), x, y)
    ]


def summary(kept: dict) -> str:
    """Return the report: conditions, table, sources, and who is above our line."""
    setting = kept['settings']
    rounds = min(len(times) for of_mode in kept['seconds'].values() for times in of_mode.values())
    lines = [
        f'{rounds} interleaved rounds, classifiers at {"x".join(map(str, setting["size"]))}, batch '
        f'{setting["batch"]}, {setting["dtype"]}, {setting["threads"]} threads, '
        f'{setting["device"]}',
        kept['environment'],
        markdown(table(kept)),
    ]
    for mode in kept['seconds']:
        above = above_our_line(kept, mode)
        lines.append(f"Peers above PolyNeXt's line, {TITLES[mode]}: {', '.join(above) or 'none'}.")
    families = dict.fromkeys(NETWORKS[name].family for name in kept['networks'])
    lines.append('Accuracies: ' + '; '.join(f'{f}: {SOURCES[f]}' for f in families) + '.')
    return '\n\n'.join(lines)


def draw(kept: dict, path: Path) -> None:
    """Draw accuracy over time, in a panel for each mode."""
    modes = list(kept['seconds'])
    figure, axes = new_figure(len(modes))
    for axis, mode in zip(axes, modes):
        times = medians(kept, mode)
        families = list(dict.fromkeys(NETWORKS[name].family for name in times))
        for family in families:
            names = [name for name in times if NETWORKS[name].family == family]
            x = [times[name] for name in names]
            y = [NETWORKS[name].accuracy for name in names]
            ours = family in OURS
            axis.plot(
                x,
                y,
                marker='o' if ours else 's',
                markersize=6 if ours else 4,
                linewidth=2.2 if ours else 1,
                linestyle='-' if ours else '--',
                zorder=3 if ours else 2,
                label=family,
            )
            for name, left, top in zip(names, x, y):
                size = NETWORKS[name].label.rpartition('-')[2]
                axis.annotate(size, (left, top), (3, -10), textcoords='offset points', fontsize=7)
        axis.set_xscale('log')
        ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
        low, high = min(times.values()) / 1.2, max(times.values()) * 1.2
        axis.set_xticks([t for t in ticks if low < t < high], minor=False)
        axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
        axis.xaxis.set_minor_formatter(lambda value, _: '')
        axis.set_xlim(low, high)
        axis.set_xlabel(f'ms, {TITLES[mode]}')
        axis.set_ylabel('ImageNet top-1, %')
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc='lower right')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# The command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('times', type=Path, help='the JSON file of the times')
    parser.add_argument(
        '--draw', type=Path, metavar='PICTURE', help='draw the file, and measure nothing'
    )
    parser.add_argument(
        '--networks',
        nargs='+',
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar='NAME',
        help=f'of {", ".join(NETWORKS)} (default: all)',
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument('--rounds', type=positive, default=20)
    parser.add_argument('--warmup', type=positive, default=1, help='steps before the first round')
    parser.add_argument('--batch', type=positive, default=1)
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='half types by autocast')
    parser.add_argument('--device', choices=DEVICES, default='cpu')
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        if args.draw is None:
            check_device(args.device)
            torch.set_num_threads(args.threads)
            limit_memory(args.device)
            settings = [
                Setting(mode, SIZE, args.batch, args.dtype, args.device, args.threads)
                for mode in args.modes
            ]
            measure(args.times, args.networks, settings, args.rounds, args.warmup)
        kept = read(args.times)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    print(summary(kept))
    if args.draw is not None:
        draw(kept, args.draw)


if __name__ == '__main__':
    main()
