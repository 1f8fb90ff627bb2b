"""Train a segmentor or a detector: ``polynext-mm train CONFIG``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..startup import end_with_launcher, resumable_start
from .arguments import UsageError, add_config, add_run_arguments

if TYPE_CHECKING:
    from mmengine.config import Config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm train',
        description='Train a segmentor or a detector',
        epilog='example: %(prog)s my_roofs.py --cfg-options train_dataloader.batch_size=4; '
        '`polynext-mm new` writes a config for a folder of yours',
    )
    add_config(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from the given checkpoint, or from the latest in the work dir',
    )
    parser.add_argument(
        '--amp', action='store_true', help='bfloat16 autocast, for configs that train in float32'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base_batch_size to the actual batch",
    )
    parser.add_argument(
        '--timeout',
        type=float,
        metavar='SECONDS',
        help="end the run when a process stands still for so long (default: the config's, 1800)",
    )
    return parser


def load_config(args: argparse.Namespace) -> Config:
    from polynext_mm.engine import launch

    cfg = launch.read_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AutocastOptimWrapper'
        cfg.optim_wrapper.dtype = 'bfloat16'
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise UsageError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.timeout is not None:
        launch.set_timeout(cfg, args.timeout)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    args = build_parser().parse_args(argv)
    with resumable_start():
        _train(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    # Registers everything, and gives mmcv its operators before mmseg or mmdet is imported.
    from polynext_mm.engine import launch

    try:
        cfg = load_config(args)
    except (UsageError, launch.config_checks.ConfigError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    launch.run(cfg, args, 'train', ('train_dataloader', 'val_dataloader'))
