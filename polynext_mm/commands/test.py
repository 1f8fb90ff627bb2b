"""Evaluate a segmentor (mIoU) or a detector (COCO AP): ``polynext-mm test CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs import find_checkpoint
from ..startup import end_with_launcher, keep_standard_streams
from ..written import OverwriteError, require_apart
from .arguments import UsageError, add_config, add_run_arguments

if TYPE_CHECKING:
    from mmengine.config import Config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm test',
        description='Evaluate a segmentor or a detector',
        epilog='example: %(prog)s work_dirs/my_roofs --tta --show-dir pictures',
    )
    add_config(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help="checkpoint: ours, or one of the authors' segmentors; in a work dir, 'best', 'last' "
        'or none for the best, else the newest',
    )
    add_run_arguments(parser)
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
    return parser


def load_config(args: argparse.Namespace) -> Config:
    from polynext_mm.engine import launch

    args.checkpoint = find_checkpoint(args.config, args.checkpoint)
    cfg = launch.read_config(args)
    cfg.load_from = args.checkpoint
    root = require_results_apart(cfg, args)
    cfg.resume = False
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        if 'tta_model' not in cfg:
            raise UsageError(f'--tta: {args.config} has no tta_model and tta_pipeline')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    if args.out is not None:
        keep_predictions(cfg, args.out, root)
    return cfg


def require_results_apart(cfg: Config, args: argparse.Namespace) -> str | None:
    """Check that no input would be overwritten; return the folder of the images.

    Raises:
        OverwriteError: If an input would be, naming it.
    """
    if args.out is None and args.show_dir is None:
        return None
    from polynext_mm.engine.results import all_files_of, files_of, label_file, root_of

    detects = cfg.default_scope == 'mmdet'
    shows = detects and args.show_dir is not None
    images, _ = files_of(cfg, 'test', with_images=shows)
    if args.show_dir is not None:
        _require_utf8(images)
    root = root_of(images)
    targets = []
    if args.out is not None:
        files = [Path(args.out)] if detects else [label_file(args.out, root, i) for i in images]
        targets += [('--out', path) for path in files]
    if shows:  # mmdet names pictures after the images, without their folders
        targets += [('--show-dir', Path(args.show_dir) / Path(image).name) for image in images]
    require_apart(targets, [*all_files_of(cfg, shows), args.config, args.checkpoint])
    return root


def _require_utf8(images: Sequence[str]) -> None:
    """Check that image names are UTF-8, as pictures are named after them: OpenCV crashes if not."""
    for image in images:
        try:
            image.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f'--show-dir: the name of {image!a} is not UTF-8, and pictures are named after '
                'their images: rename it'
            ) from None


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    from polynext_mm.engine.checks.decoding import Decoder, image_decoder
    from polynext_mm.engine.results import DecodedVisualizationHook

    how = dict(show=args.show, wait_time=args.wait_time)
    decoder = image_decoder(cfg.test_dataloader.dataset.get('pipeline') or ())
    if cfg.default_scope == 'mmseg' and decoder is not None and decoder != Decoder():
        cfg.default_hooks.visualization = dict(
            type=DecodedVisualizationHook.__name__,
            color_type=decoder.flag,
            imdecode_backend=decoder.backend,
            **how,
        )
    else:
        cfg.default_hooks.visualization.update(draw=True, interval=1, **how)
    if args.show_dir:
        if cfg.default_scope == 'mmdet':
            cfg.default_hooks.visualization.test_out_dir = str(Path(args.show_dir).absolute())
        else:
            cfg.visualizer.save_dir = args.show_dir


def keep_predictions(cfg: Config, out: str, root: str | None) -> None:
    evaluators = cfg.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    if cfg.default_scope == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise UsageError(f'--out must end in .pkl for detections, got {out}')
        cfg.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]
    else:
        cfg.test_evaluator = [*evaluators, dict(type='LabelImages', out=out, root=root)]


def main(argv: Sequence[str] | None = None) -> int:
    end_with_launcher()
    keep_standard_streams()
    args = build_parser().parse_args(argv)
    # Registers everything, and gives mmcv its operators before mmseg or mmdet is imported.
    from polynext_mm.engine import launch

    try:
        cfg = load_config(args)
    except (
        UsageError,
        OverwriteError,
        launch.config_checks.ConfigError,
        FileNotFoundError,
    ) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    launch.run(cfg, args, 'test', ('test_dataloader',))
    return 0
