"""Train a segmentor or a detector: ``tools/train.py CONFIG``."""

import argparse

from mmengine.config import Config

# Registers everything, and gives mmcv its operators before mmseg or mmdet is imported.
from polynext_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a segmentor or a detector')
    parser.add_argument('config', help='config file')
    launch.add_arguments(parser)
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
        help='end the run when a process stands still for so long (default: as of the config, 1800)',
    )
    return parser.parse_args()


def load_config(args: argparse.Namespace) -> Config:
    cfg = launch.read_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AutocastOptimWrapper'
        cfg.optim_wrapper.dtype = 'bfloat16'
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ValueError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.timeout is not None:
        launch.set_timeout(cfg, args.timeout)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def main() -> None:
    args = parse_args()
    launch.run(load_config(args), args, 'train', ('train_dataloader', 'val_dataloader'))


if __name__ == '__main__':
    main()
