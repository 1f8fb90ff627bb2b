"""Train a segmentor or a detector: ``tools/train.py CONFIG``."""
import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

import polynext_mm  # noqa: F401 - registers, and gives mmcv its operators, before mm is imported
from polynext_mm.engine.launch import build_runner, init_distributed, leave_distributed, require_dataset
from polynext_mm.weights import CheckpointError, safe_reading


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a segmentor or a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='for logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='continue from the given checkpoint, or from the latest in the work dir')
    parser.add_argument('--amp', action='store_true',
                        help='bfloat16 autocast, for configs that train in float32')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate to the config's base_batch_size")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='settings of the config to override, as key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if args.amp:
        cfg.optim_wrapper.type = 'AutocastOptimWrapper'
        cfg.optim_wrapper.dtype = 'bfloat16'
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ValueError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    try:
        require_dataset(cfg.train_dataloader.dataset)
        if cfg.get('val_dataloader'):
            require_dataset(cfg.val_dataloader.dataset)
        init_distributed(args.launcher, cfg)
        with safe_reading():
            build_runner(cfg).train()
        leave_distributed()
    except (FileNotFoundError, CheckpointError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
    main()
