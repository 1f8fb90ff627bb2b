"""Measure accuracy on ImageNet-1K, and robustness: ``polynext-mm validate-imagenet``.

It takes the networks of the authors' release, in any file that :func:`polynext_mm.weights.read`
reads, and timm's models. timm resizes, crops and normalizes images as for the published figures,
which are printed beside those measured. The benchmarks besides ImageNet-1K are those of the paper's
robustness table:

- ImageNet-A (arXiv 1907.07174) and ImageNet-R (arXiv 2006.16241) have 200 of the classes, and a
  prediction is the best of these, as in their authors' evaluation.
- ImageNet-Sketch (arXiv 1905.13549) has all classes.
- ImageNet-C (arXiv 1903.12261) has 15 corruptions in five severities. A corruption error is the
  mean error over the severities relative to AlexNet's, and mCE the mean of the 15. Its images are
  already 224x224 crops, so they are resized only if the model's input has another size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..compat.optional import require_timm
from .arguments import not_negative, positive
from .imagenet_benchmarks import BENCHMARKS, find_images


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm validate-imagenet',
        description='Measure a classifier on ImageNet-1K and on the benchmarks of robustness',
    )
    parser.add_argument(
        'model',
        help='polynext://NAME, the path or url of a file, or timm://NAME for a model of timm',
    )
    for benchmark in BENCHMARKS:
        parser.add_argument(
            f'--{benchmark.option}',
            type=Path,
            metavar='FOLDER',
            help=f'{benchmark.name}, with FOLDER/{benchmark.layout}',
        )
    parser.add_argument(
        '--partial',
        action='store_true',
        help='measure the classes that are there, where some are missing; no published figure '
        'compares with that',
    )
    parser.add_argument('--batch-size', type=positive, default=64, help='default: %(default)s')
    parser.add_argument(
        '--workers', type=not_negative, default=4, help='processes that load (default: %(default)s)'
    )
    parser.add_argument('--device', help='such as cuda:1 (default: cuda where there is one)')
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'float16'],
        default='float32',
        help='other than float32 is autocast (default: %(default)s)',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to a file too')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = [
        (benchmark, folder)
        for benchmark in BENCHMARKS
        if (folder := getattr(args, benchmark.option.replace('-', '_'))) is not None
    ]
    if not given:
        options = ', '.join(f'--{benchmark.option}' for benchmark in BENCHMARKS)
        parser.error(f'nothing to measure on: give the folder of at least one of {options}')
    import torch

    from ..weights import CheckpointError
    from .imagenet_scores import Conditions, as_json, load_subject, measure, table

    try:
        device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as error:
        parser.error(f'--device: {error}')
    conditions = Conditions(device, getattr(torch, args.dtype), args.batch_size, args.workers)
    try:
        if args.json is not None:  # fail now, not after hours of measuring
            args.json.parent.mkdir(parents=True, exist_ok=True)
        require_timm()
        found = [
            (benchmark, find_images(benchmark, folder, args.partial)) for benchmark, folder in given
        ]
        subject = load_subject(args.model)
        subject.model.to(device)
        results = [measure(subject, *pair, conditions) for pair in found]
    except (CheckpointError, OSError, ImportError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    height, width = subject.transform['input_size'][1:]
    print(
        f'{subject.name} on {device} in {args.dtype}, images of {height}x{width}',
        table(subject, results),
        sep='\n',
    )
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(subject, results, conditions), indent=2) + '\n')
    return 0
