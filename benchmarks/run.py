"""Measure PolyNeXt side by side with its plain formulation and its peers: time and peak memory.

    python benchmarks/run.py --models cpolynext_s plain:cpolynext_s timm:convformer_s18 \\
        --mode inference train --sizes 512x512 800x1344 --memory --out work_dirs/benchmark
    python benchmarks/run.py --attention 1024 2048 4096 8192 16384
    python benchmarks/run.py --profile apolynext_s --mode train
    python benchmarks/run.py --floor cpolynext_s

Models are called by the name of an arch (ours), ``plain:ARCH`` (the equations written naively) or
``timm:NAME`` (any timm model with ``features_only``; in the faster of its memory formats, unless
``:contiguous`` or ``:channels_last`` follows). Modifiers come last: ``+compile`` for all, and for
ours ``+fuse`` (weights folded for inference) and ``+cp`` (checkpointed cells). All return the
features of their stages; training is forward and backward of the sum of the features' means,
without optimizer.

How time and memory are measured is told at the head of benchmarks/measure.py.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from measure import (
    ATTENTION,
    DTYPES,
    Setting,
    Subject,
    cpu_name,
    limit_memory,
    make_workload,
    parse_subject,
    peak_memory,
    seconds,
    take_turns,
    warmed_up,
)
from report import Record, markdown, plot_attention, plot_comparison, write_csv

BUSY_LOAD = 0.5  # a core, of other processes
NOISY_SPREAD = 0.1  # interquartile range over the median
PROFILE_ROWS = 12
MIB = 1 << 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group('what to measure, at least one')
    what.add_argument(
        '--models', nargs='+', type=model, metavar='MODEL', default=[], help='models to compare'
    )
    what.add_argument(
        '--attention',
        nargs='+',
        type=positive,
        metavar='TOKENS',
        default=[],
        help='forward and backward of polynomial attention alone',
    )
    what.add_argument(
        '--profile',
        type=model,
        metavar='MODEL',
        help='where the time goes, by operation (at the first mode and size)',
    )
    what.add_argument(
        '--floor',
        type=model,
        metavar='MODEL',
        help="the least time that the model's operations can take on this machine",
    )
    how = parser.add_argument_group('how')
    how.add_argument('--mode', nargs='+', choices=['inference', 'train'], default=['inference'])
    how.add_argument('--sizes', nargs='+', type=image_size, metavar='HxW', default=[(512, 512)])
    how.add_argument('--batch', type=positive, default=1)
    how.add_argument('--dtype', choices=DTYPES, default='float32', help='half types by autocast')
    how.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    how.add_argument(
        '--threads',
        type=positive,
        default=torch.get_num_threads(),
        help='of the CPU (default: %(default)s)',
    )
    how.add_argument('--rounds', type=positive, default=10)
    how.add_argument('--warmup', type=positive, default=2, help='steps before the rounds')
    how.add_argument(
        '--memory', action='store_true', help='peak memory too (--attention always measures it)'
    )
    how.add_argument(
        '--matrix-up-to',
        type=int,
        default=4096,
        metavar='TOKENS',
        help='most tokens at which attention with the whole matrix is measured, too',
    )
    how.add_argument('--baseline', metavar='MODEL', help='of the ratios (default: the first model)')
    how.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='write results.md, and a CSV file and a plot of every comparison',
    )
    args = parser.parse_args()
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def model(label: str) -> Subject:
    try:
        return parse_subject(label)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def image_size(text: str) -> tuple[int, ...]:
    height, _, width = text.partition('x')
    try:
        return positive(height), positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 512x512') from None


def check(args: argparse.Namespace) -> None:
    """Find what does not go together, and fill in the baseline.

    Raises:
        ValueError: Saying what to change.
    """
    single = [s for s in (args.profile, args.floor) if s is not None]
    if not args.models and not args.attention and not single:
        raise ValueError('nothing to measure: give --models, --attention, --profile or --floor')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('torch finds no CUDA device: use --device cpu')
    for subject in (*args.models, *single):
        if 'fuse' in subject.modifiers and 'train' in args.mode:
            raise ValueError(f'{subject.label} is for inference alone: leave out +fuse or train')
    for subject in single:
        if subject.memory_format is None:
            raise ValueError(
                f'{subject.label}: --profile and --floor need a memory format: write '
                f'timm:{subject.name}:channels_last, say'
            )
    if args.floor is not None and (args.dtype != 'float32' or args.device != 'cpu'):
        raise ValueError('--floor is for float32 on the CPU')
    labels = [subject.label for subject in args.models]
    if len(set(labels)) < len(labels):
        raise ValueError('--models has a model twice')
    if args.models and args.baseline is None:
        args.baseline = labels[0]
    if args.models and args.baseline not in labels:
        raise ValueError(f'--baseline {args.baseline} is not among --models: {", ".join(labels)}')


@dataclasses.dataclass
class Result:
    """What was measured of a subject; no times if it did not fit into memory."""

    subject: Subject
    setting: Setting
    times: list[float]  # seconds, one a round
    peak: int | None = None
    method: str | None = None  # of measuring the peak

    @property
    def quartiles(self) -> list[float]:
        """Seconds; the middle one is the median."""
        return np.percentile(self.times, [25, 50, 75]).tolist()

    @property
    def spread(self) -> float:
        first, median, third = self.quartiles
        return (third - first) / median


def all_settings(args: argparse.Namespace) -> list[Setting]:
    return [make_setting(args, mode, size) for mode in args.mode for size in args.sizes]


def make_setting(args: argparse.Namespace, mode: str, size: tuple[int, ...]) -> Setting:
    return Setting(mode, size, args.batch, args.dtype, args.device, args.threads)


def measure(
    subjects: list[Subject], setting: Setting, rounds: int, warmup: int, memory: bool
) -> list[Result]:
    """One result a subject, in order, at one setting."""
    times = measure_times(
        [variant for subject in subjects for variant in subject.variants()], setting, rounds, warmup
    )
    results = [fastest(subject, setting, times) for subject in subjects]
    if setting.device == 'cuda':
        torch.cuda.empty_cache()  # for the processes that measure memory
    for result in results:
        if memory and result.times:
            say(f'memory of {result.subject.label}, {setting.mode}, {setting.shown_size}')
            result.peak, result.method = peak_memory(result.subject, setting)
    return results


def measure_times(
    subjects: list[Subject], setting: Setting, rounds: int, warmup: int
) -> dict[Subject, list[float]]:
    """Seconds of every subject that fits into memory, one a round."""
    torch.compiler.reset()  # what was compiled for other settings serves nobody any more
    works = {}
    for subject in subjects:
        say(f'{subject.label} ({subject.memory_format}), {setting.mode}, {setting.shown_size}')
        works[subject] = warmed_up(subject, setting, warmup)
    return take_turns(
        {subject: work for subject, work in works.items() if work is not None},
        rounds,
        setting.device,
    )


def fastest(subject: Subject, setting: Setting, times: dict[Subject, list[float]]) -> Result:
    """The result of the subject's fastest variant."""
    fitting = [variant for variant in subject.variants() if variant in times]
    if not fitting:
        return Result(subject, setting, [])
    best = min(fitting, key=lambda variant: statistics.median(times[variant]))
    return Result(best, setting, times[best])


def compare(args: argparse.Namespace) -> tuple[list[Record], list[Result]]:
    """Records of all models at all settings, with their ratios to the baseline."""
    records, everything = [], []
    for setting in all_settings(args):
        results = measure(args.models, setting, args.rounds, args.warmup, args.memory)
        baseline = next(r for r in results if r.subject.label == args.baseline)
        records += [comparison(result, baseline) for result in results]
        everything += results
    return records, everything


def comparison(result: Result, baseline: Result) -> Record:
    return {
        'mode': result.setting.mode,
        'size': result.setting.shown_size,
        'model': result.subject.label,
        'memory format': result.subject.memory_format,
        **time_columns(result),
        'time ratio': time_ratio(result, baseline),
        'peak MiB': None if result.peak is None else result.peak / MIB,
        'memory ratio': None
        if None in (result.peak, baseline.peak)
        else result.peak / baseline.peak,
    }


def time_columns(result: Result) -> Record:
    first, median, third = (
        (1e3 * t for t in result.quartiles) if result.times else (None, None, None)
    )
    return {'median ms': median, 'q1 ms': first, 'q3 ms': third}


def time_ratio(result: Result, baseline: Result) -> float | None:
    """The median over rounds of the ratio within a round: a drift of the machine cancels."""
    if not result.times or not baseline.times:
        return None
    return statistics.median(a / b for a, b in zip(result.times, baseline.times))


def attention(args: argparse.Namespace) -> tuple[list[Record], list[Result]]:
    """Records of polynomial attention in blocks, and with the whole matrix where that is asked."""
    everything = []
    for tokens in args.attention:
        forms = [
            Subject(form, 'attention', form, 'contiguous')
            for form in ATTENTION
            if form == 'blocks' or tokens <= args.matrix_up_to
        ]
        everything += measure(
            forms, make_setting(args, 'train', (tokens,)), args.rounds, args.warmup, memory=True
        )
    return [attention_record(result) for result in everything], everything


def attention_record(result: Result) -> Record:
    """Per token and per pair of tokens, all heads together."""
    batch, (tokens,) = result.setting.batch, result.setting.size
    return {
        'tokens': result.setting.shown_size,
        'form': result.subject.label,
        **time_columns(result),
        'ns per pair': 1e9 * statistics.median(result.times) / (batch * tokens**2)
        if result.times
        else None,
        'peak MiB': None if result.peak is None else result.peak / MIB,
        'bytes per token': None if result.peak is None else result.peak / (batch * tokens),
    }


def profile(subject: Subject, setting: Setting, rounds: int, warmup: int) -> list[Record]:
    """The operations that take most of the time, without that of the operations they call."""
    work = make_workload(subject, setting)
    for _ in range(warmup):
        work.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    own_time = 'self_cpu_time_total'
    if setting.device == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        own_time = 'self_device_time_total'
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(rounds):
            seconds(work.step, setting.device)
    # a GPU's kernels are listed once more by themselves: the operations have their time
    events = {
        event.key: (getattr(event, own_time), event.count)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU
    }
    total = sum(microseconds for microseconds, _ in events.values())
    top = sorted(events.items(), key=lambda item: item[1], reverse=True)[:PROFILE_ROWS]
    return [
        {
            'operation': key,
            'share': f'{microseconds / total:.1%}',
            'ms per step': microseconds / 1e3 / rounds,
            'calls per step': count / rounds,
        }
        for key, (microseconds, count) in top
    ]


class Roofline(TorchDispatchMode):
    """Add up the least time of all operations that run under it: of each, the longer of doing its
    floating-point operations at ``flops`` a second (matrix products, convolutions and attention
    have some) and of moving its inputs and outputs at ``bandwidth`` bytes a second.

    Operations that are fused by a compiler, or find their inputs in a cache, can beat it.
    """

    UNMOVED = ('aten::_unsafe_view', 'aten::empty', 'aten::empty_like', 'aten::new_empty')

    def __init__(self, flops: float, bandwidth: float):
        super().__init__()
        self.rates = flops, bandwidth
        self.flops = self.bytes = self.seconds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not is_view(func) and func._schema.name not in self.UNMOVED:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            moved = sum(
                leaf.numel() * leaf.element_size()
                for leaf in tree_leaves((args, kwargs, out))
                if isinstance(leaf, torch.Tensor)
            )
            self.flops += flops
            self.bytes += moved
            self.seconds += max(flops / self.rates[0], moved / self.rates[1])
        return out


def is_view(func) -> bool:
    """Whether what it returns is its input seen differently (and was not written to)."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def floor(subject: Subject, setting: Setting, rounds: int, warmup: int) -> Record:
    """The least time of a step, by :class:`Roofline` at this machine's rates, and the real one."""
    roofline = Roofline(gemm_rate(), copy_rate())
    eager = tuple(modifier for modifier in subject.modifiers if modifier != 'compile')
    work = make_workload(
        dataclasses.replace(subject, modifiers=eager), dataclasses.replace(setting, device='meta')
    )
    with roofline:
        work.step()
    (result,) = measure([subject], setting, rounds, warmup, memory=False)
    measured = statistics.median(result.times) if result.times else None
    return {
        'mode': setting.mode,
        'size': setting.shown_size,
        'model': subject.label,
        'GMACs': roofline.flops / 2e9,
        'GB moved': roofline.bytes / 1e9,
        'GEMM GFLOP/s': roofline.rates[0] / 1e9,
        'copy GB/s': roofline.rates[1] / 1e9,
        'floor ms': 1e3 * roofline.seconds,
        'measured ms': None if measured is None else 1e3 * measured,
        'measured / floor': None if measured is None else measured / roofline.seconds,
    }


def gemm_rate(n: int = 1024) -> float:
    """Floating-point operations a second of the best of ten float32 products of (n, n)."""
    a, b, out = (torch.ones(n, n) for _ in range(3))
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out), 'cpu') for _ in range(10))


def copy_rate(count: int = 1 << 26) -> float:
    """Bytes read and written a second by the best of ten copies of so many float32 numbers, which
    should not fit into a cache."""
    source, target = torch.ones(count), torch.ones(count)
    return 8 * count / min(seconds(lambda: target.copy_(source), 'cpu') for _ in range(10))


def say(line: str) -> None:
    """Tell the user, without mixing it into the report."""
    print(line, file=sys.stderr, flush=True)


def environment(args: argparse.Namespace) -> str:
    """What the numbers depend on, and whether the machine is busy with something else."""
    cores, load = os.cpu_count() or 1, os.getloadavg()
    lines = [
        ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'polynext-mm')),
        f'{cpu_name()}, {cores} cores, {args.threads} threads used',
        f'{args.dtype}, batch {args.batch}, {args.rounds} rounds in turns after {args.warmup} '
        f'warm-up steps, on {args.device}',
        'load average before: {:.2f} {:.2f} {:.2f}'.format(*load),
    ]
    if args.device == 'cuda':
        lines.append(torch.cuda.get_device_name())
    if load[0] > BUSY_LOAD * cores:
        lines.append(
            f'**WARNING: the machine is busy (load {load[0]:.2f} on {cores} cores): the '
            'times are not to be trusted**'
        )
    return '\n'.join(f'- {line}' for line in lines)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def notes(results: list[Result]) -> str:
    """What to know before believing the table."""
    lines = []
    measured = [result for result in results if result.times]
    if measured:
        worst = max(result.spread for result in measured)
        lines.append(f'Largest spread of the times (interquartile range / median): {worst:.1%}.')
    for result in results:
        where = f'{result.subject.label}, {result.setting.mode}, {result.setting.shown_size}'
        if not result.times:
            lines.append(f'{where}: did not fit into memory.')
        elif result.spread > NOISY_SPREAD:
            lines.append(
                f'**WARNING: {where}: spread {result.spread:.1%}: measure again on a '
                'quieter machine, or with more rounds.**'
            )
        if result.method is not None and result.peak is None:
            lines.append(f'{where}: no peak memory: {result.method}.')
    methods = {result.method for result in results if result.peak is not None}
    if methods:
        lines.append(
            'Peak memory: weights, gradients, activations and scratch space of a step, in '
            f'a process of its own, by {", ".join(sorted(methods))}.'
        )
    return '\n'.join(f'- {line}' for line in lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    limit_memory(args.device)
    sections = []

    def report(text: str) -> None:
        print(text, end='\n\n', flush=True)
        sections.append(text)

    def report_table(title, table, picture, plot, records, results):
        report(f'## {title}\n\n{markdown(records)}\n\n{notes(results)}')
        if args.out is not None:
            write_csv(records, args.out / table)
            plot(records, args.out / picture)

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    report(environment(args))
    if args.models:
        report_table(
            f'Against {args.baseline}',
            'results.csv',
            'results.png',
            plot_comparison,
            *compare(args),
        )
    if args.attention:
        report_table(
            f'Attention alone, whole matrix up to {args.matrix_up_to} tokens',
            'attention.csv',
            'curve.png',
            plot_attention,
            *attention(args),
        )
    if args.profile is not None:
        setting = all_settings(args)[0]
        report(
            f'## Where the time goes: {args.profile.label}, {setting.mode}, '
            f'{setting.shown_size}\n\n'
            + markdown(profile(args.profile, setting, args.rounds, args.warmup))
        )
    if args.floor is not None:
        report(
            '## Floor\n\n'
            + markdown(
                [
                    floor(args.floor, setting, args.rounds, args.warmup)
                    for setting in all_settings(args)
                ]
            )
        )
    if args.out is not None:
        (args.out / 'results.md').write_text('\n\n'.join(sections) + '\n')


if __name__ == '__main__':
    main()
