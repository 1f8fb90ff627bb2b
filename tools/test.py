"""Evaluate a segmentor (mIoU) or a detector (COCO AP): ``tools/test.py CONFIG CHECKPOINT``."""

import argparse
from pathlib import Path

from mmengine.config import Config

# Registers everything, and gives mmcv its operators before mmseg or mmdet is imported.
from polynext_mm.engine import launch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Evaluate a segmentor or a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help="checkpoint: ours, or one of the authors' segmentors")
    launch.add_arguments(parser)
    parser.add_argument(
        '--out',
        help='keep the predictions: in a folder as label images (segmentation), '
        'or in a .pkl file (detection)',
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with the predictions drawn in')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show shows an image (default: %(default)s)',
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


def load_config(args: argparse.Namespace) -> Config:
    cfg = launch.read_config(args)
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
            raise ValueError(f'--out must end in .pkl for detections, got {out}')
        evaluators = cfg.test_evaluator
        evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
        cfg.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]
    else:
        cfg.test_evaluator.update(output_dir=out, keep_results=True)


def main() -> None:
    args = parse_args()
    launch.run(load_config(args), args, 'test', ('test_dataloader',))


if __name__ == '__main__':
    main()
