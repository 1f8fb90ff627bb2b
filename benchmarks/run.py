"""Compare PolyNeXt with its plain formulation and its peers: time and peak memory.

    python benchmarks/run.py --models cpolynext_s plain:cpolynext_s timm:convformer_s18 \\
        --mode inference train --sizes 512x512 800x1344 --memory --out work_dirs/benchmark
    python benchmarks/run.py --attention 1024 2048 4096 8192 16384
    python benchmarks/run.py --profile apolynext_s --mode train
    python benchmarks/run.py --floor cpolynext_s
    python benchmarks/run.py --count cpolynext_s apolynext_s --mode train --batch 8 --dtype bfloat16

A model is the name of an arch (ours), ``plain:ARCH`` (the paper's equations in ordinary torch),
``timm:NAME`` (any timm model with ``features_only``, in the faster memory format unless
``:contiguous`` or ``:channels_last`` follows), ``onnxruntime:ARCH`` or ``openvino:ARCH`` (ours, as
these run the exported ONNX file), or ``uper:BACKBONE`` (UperNet as a whole with 150 classes;
benchmarks/segmentors.py has the peers' names). Modifiers come last: ``+compile`` for backbones in
torch, ``+graph`` for these as one CUDA graph, ``+fuse`` (weights folded for inference) and ``+cp``
(checkpointed cells) for ours. Backbones return the features of their stages; training is forward
and backward of the sum of the features' means, or of a segmentor's losses, without an optimizer.

benchmarks/measure.py describes how time and memory are measured.
"""

import argparse
from pathlib import Path

import torch

import count
from exported import PROGRAMS
from measure import limit_memory, measure, seconds
from polynext_mm.commands.arguments import image_size, positive
from polynext_mm.compat.torch_features import CUSTOM_OPERATORS
from report import (
    Report,
    attention_costs,
    comparison,
    environment,
    markdown,
    plot_attention,
    plot_comparison,
)
from roofline import floor
from subjects import (
    ATTENTION,
    DEVICES,
    DTYPES,
    Setting,
    Subject,
    check_device,
    make_workload,
    parse_subject,
)

PROFILE_ROWS = 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='polynext-mm benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group('what to measure, at least one of')
    what.add_argument(
        '--models', nargs='+', type=model, metavar='MODEL', default=[], help='models to compare'
    )
    what.add_argument(
        '--attention',
        nargs='+',
        type=positive,
        metavar='TOKENS',
        default=[],
        help='forward and backward of polynomial attention alone, with its peak memory',
    )
    what.add_argument(
        '--profile',
        type=model,
        metavar='MODEL',
        help='where the time goes, by operation (first mode and size only)',
    )
    what.add_argument(
        '--floor',
        type=model,
        metavar='MODEL',
        help="the least time that the model's operations can take on this machine",
    )
    what.add_argument(
        '--count',
        nargs='+',
        type=model,
        metavar='MODEL',
        default=[],
        help='launches, bytes and FLOPs of a step on a GPU, which need none (benchmarks/count.py)',
    )
    how = parser.add_argument_group('how')
    how.add_argument('--mode', nargs='+', choices=['inference', 'train'], default=['inference'])
    how.add_argument('--sizes', nargs='+', type=image_size, metavar='HxW', default=[(512, 512)])
    how.add_argument('--batch', type=positive, default=1)
    how.add_argument('--dtype', choices=DTYPES, default='float32', help='half types by autocast')
    how.add_argument('--device', choices=DEVICES, default='cpu')
    how.add_argument(
        '--threads',
        type=positive,
        default=torch.get_num_threads(),
        help='CPU threads (default: %(default)s)',
    )
    how.add_argument('--rounds', type=positive, default=10, help='timed steps of every model')
    how.add_argument('--warmup', type=positive, default=2, help='steps before the first round')
    how.add_argument('--memory', action='store_true', help='measure peak memory of --models too')
    how.add_argument(
        '--matrix-up-to',
        type=int,
        default=4096,
        metavar='TOKENS',
        help='measure attention with the whole matrix too, up to this many tokens',
    )
    how.add_argument(
        '--baseline', metavar='MODEL', help='divisor of the ratios (default: the first model)'
    )
    how.add_argument('--gpu', choices=count.DEVICES, default='h100', help='of the times of --count')
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


def check(args: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, and fill in the baseline.

    Raises:
        ValueError: Saying what to change.
    """
    single = [subject for subject in (args.profile, args.floor) if subject is not None]
    if not args.models and not args.attention and not args.count and not single:
        raise ValueError(
            'nothing to measure: give --models, --attention, --profile, --floor or --count'
        )
    check_device(args.device)
    single += args.count
    if (args.count or args.floor is not None) and not CUSTOM_OPERATORS.is_there:
        raise ValueError(
            f'--floor and --count need torch {CUSTOM_OPERATORS.since} or newer, and this is '
            f'{torch.__version__}'
        )
    if args.count and args.dtype == 'float16':
        raise ValueError('--count is for float32 and bfloat16')
    for subject in (*args.models, *single):
        if 'graph' in subject.modifiers and args.device != 'cuda':
            raise ValueError(f'{subject.label} is for --device cuda')
        if 'fuse' in subject.modifiers and 'train' in args.mode:
            raise ValueError(f'{subject.label} is for inference only: leave out +fuse or train')
        if subject.kind == 'uper' and 'train' in args.mode and args.batch < 2:
            raise ValueError(f'{subject.label} trains on two images or more: --batch 2')
        if subject.kind in PROGRAMS and (
            'train' in args.mode or args.dtype != 'float32' or args.device != 'cpu'
        ):
            raise ValueError(f'{subject.label} is for inference in float32 on the CPU')
    for subject in single:
        if subject.kind in PROGRAMS:
            raise ValueError(f'{subject.label}: only --models takes {subject.kind}')
        if subject.memory_format is None:
            raise ValueError(
                f'{subject.label}: --profile, --floor and --count need a memory format: '
                f'write {subject.label.replace(subject.name, subject.name + ":channels_last")}'
            )
    for subject in (args.floor, *args.count):
        if subject is not None and subject.kind == 'uper':
            raise ValueError(f'{subject.label}: --floor and --count take backbones alone')
    if args.floor is not None and (args.dtype != 'float32' or args.device != 'cpu'):
        raise ValueError('--floor is for float32 on the CPU')
    labels = [subject.label for subject in args.models]
    if len(set(labels)) < len(labels):
        raise ValueError('--models names a model twice')
    if args.models and args.baseline is None:
        args.baseline = labels[0]
    if args.models and args.baseline not in labels:
        raise ValueError(f'--baseline {args.baseline} is not among --models: {", ".join(labels)}')


def setting(args: argparse.Namespace, mode: str, size: tuple[int, ...]) -> Setting:
    return Setting(mode, size, args.batch, args.dtype, args.device, args.threads)


def settings(args: argparse.Namespace) -> list[Setting]:
    return [setting(args, mode, size) for mode in args.mode for size in args.sizes]


# The sections of the report, one function for each option of what to measure


def compare_models(args: argparse.Namespace, report: Report) -> None:
    records, results = [], []
    for where in settings(args):
        found = measure(args.models, where, args.rounds, args.warmup, args.memory)
        baseline = next(r for r in found if r.subject.label == args.baseline)
        records += [comparison(result, baseline) for result in found]
        results += found
    report.add_results(f'Against {args.baseline}', records, results, 'results', plot_comparison)


def measure_attention(args: argparse.Namespace, report: Report) -> None:
    results = []
    for tokens in args.attention:
        forms = [
            Subject(form, 'attention', form, 'contiguous')
            for form in ATTENTION
            if form == 'blocks' or tokens <= args.matrix_up_to
        ]
        where = setting(args, 'train', (tokens,))
        results += measure(forms, where, args.rounds, args.warmup, memory=True)
    title = f'Attention alone, whole matrix up to {args.matrix_up_to} tokens'
    records = [attention_costs(result) for result in results]
    report.add_results(title, records, results, 'attention', plot_attention)


def profile(args: argparse.Namespace, report: Report) -> None:
    where = settings(args)[0]
    work = make_workload(args.profile, where)
    for _ in range(args.warmup):
        work.step()
    with torch.profiler.profile() as profiler:
        for _ in range(args.rounds):
            seconds(work.step, args.device)
    table = profiler.key_averages().table(
        sort_by=f'self_{"cpu" if args.device == "cpu" else "device"}_time_total',
        row_limit=PROFILE_ROWS,
    )
    report.add(
        f'## Where the time goes: {args.profile.label}, {where.mode}, {where.shown_size}, '
        f'{args.rounds} steps\n\n```\n{table.strip()}\n```'
    )


def find_floor(args: argparse.Namespace, report: Report) -> None:
    records = [floor(args.floor, where, args.rounds, args.warmup) for where in settings(args)]
    report.add(f'## Floor\n\n{markdown(records)}')


def count_launches(args: argparse.Namespace, report: Report) -> None:
    records = [
        count.costs(subject, where, args.gpu) for where in settings(args) for subject in args.count
    ]
    report.add(
        f'## Counted for {args.gpu.upper()}, batch {args.batch}, {args.dtype}\n\n'
        f'{markdown(records)}'
    )


SECTIONS = {
    'models': compare_models,
    'attention': measure_attention,
    'profile': profile,
    'floor': find_floor,
    'count': count_launches,
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    limit_memory(args.device)
    report = Report(args.out)
    report.add(environment(settings(args)[0], args.rounds, args.warmup))
    for option, add_section in SECTIONS.items():
        if getattr(args, option):
            add_section(args, report)


if __name__ == '__main__':
    main()
