"""Count parameters and multiply-adds of a config's model: ``polynext-mm flops CONFIG``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import add_cfg_options, add_config, read_config

if TYPE_CHECKING:
    from mmengine.config import Config

    from polynext_mm.analysis import Cost


class Shape(argparse.Action):
    """One or two positive numbers."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2 or min(values) < 1:
            parser.error(f'{option_string} takes H and W, or one number for a square')
        setattr(namespace, self.dest, (values[0], values[-1]))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm flops',
        description='Count parameters and multiply-adds of a segmentor, a detector or a backbone',
    )
    add_config(parser)
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        action=Shape,
        metavar=('H', 'W'),
        help='of the image, one number for a square (default: 512 2048 for segmentors, 800 1280 '
        'for detectors, 224 224 for backbones)',
    )
    parser.add_argument(
        '--by-module',
        type=int,
        nargs='?',
        const=1,
        metavar='DEPTH',
        help='print a line for each module, of names up to this depth (default: 1)',
    )
    parser.add_argument(
        '--device',
        choices=['meta', 'cpu'],
        help='meta computes nothing, cpu does (default: meta, and cpu for models that need values)',
    )
    add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = read_config(args)
    from polynext_mm.analysis import table

    try:
        cost = _count(config, args.shape, args.device)
    except (ValueError, RuntimeError) as error:
        sys.exit(f'{args.config}: {error}')
    if args.by_module is not None:
        print(table(cost, args.by_module))
    _, height, width = cost.shape
    print(f'{args.config}, inference on one image of {height}x{width}')
    print(f'parameters {cost.parameters / 1e6:10.2f} M')
    print(f'MACs       {cost.macs / 1e9:10.2f} G  multiply-adds, which many papers call FLOPs')
    print(f'FLOPs      {cost.flops / 1e9:10.2f} G  multiplications and additions apart')
    return 0


def _count(config: Config, shape: tuple[int, int] | None, device: str | None) -> Cost:
    """Count on a device; by default on the meta device or, if that fails, on the CPU."""
    from polynext_mm.analysis import NeedsValuesError, count_config

    try:
        return count_config(config, shape, device or 'meta')
    except NeedsValuesError as error:
        if device:
            raise
        print(f'counting on the CPU, which takes longer: {error.reason}', file=sys.stderr)
    return count_config(config, shape, 'cpu')
