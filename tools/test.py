"""Evaluate a segmentor (mIoU) or a detector (COCO AP): ``tools/test.py CONFIG CHECKPOINT``."""
import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

import polynext_mm  # noqa: F401 - registers, and gives mmcv its operators, before mm is imported
from polynext_mm.engine.launch import build_runner, init_distributed, leave_distributed, require_dataset
from polynext_mm.weights import CheckpointError, safe_reading


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Evaluate a segmentor or a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help="checkpoint: ours, or one of the authors' segmentors")
    parser.add_argument('--work-dir', help='for logs and figures (default: work_dirs/CONFIG)')
    parser.add_argument('--out', help='keep the predictions: a folder of label images (segmentation) '
                                      'or a .pkl file (detection)')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='write pictures of the predictions there')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a shown picture stays')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
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
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        if 'tta_model' not in cfg:
            raise ValueError(f'--tta: {args.config} has no tta_model and tta_pipeline')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    if args.out is not None:
        keep_predictions(cfg, args.out)
    return cfg


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.default_hooks.visualization
    hook.update(draw=True, interval=1, show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        if cfg.default_scope == 'mmdet':
            hook.test_out_dir = str(Path(args.show_dir).absolute())
        else:
            cfg.visualizer.save_dir = args.show_dir


def keep_predictions(cfg: Config, out: str) -> None:
    if cfg.default_scope == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out: detections are kept in a .pkl file, got {out}')
        evaluators = cfg.test_evaluator
        evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
        cfg.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]
    else:
        cfg.test_evaluator.update(output_dir=out, keep_results=True)


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    try:
        require_dataset(cfg.test_dataloader.dataset)
        init_distributed(args.launcher, cfg)
        with safe_reading():
            build_runner(cfg).test()
        leave_distributed()
    except (FileNotFoundError, CheckpointError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
    main()
