"""Draw a model's predictions into images: ``polynext-mm predict IMAGE CONFIG CHECKPOINT``.

The config may be a segmentor's or a detector's, and IMAGE may be a folder of images.

MMSegInferencer and DetInferencer are not used: they choose the names of the files they write,
MMSegInferencer holds the logits of a whole folder before it draws, and the images that they return
are resampled by matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polynext_mm.shipped import find_config

from .arguments import UsageError, add_config

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
TASKS = ('mmseg', 'mmdet')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm predict', description="Draw a model's predictions into images"
    )
    parser.add_argument('image', type=Path, help='an image, or a folder of images')
    add_config(parser)
    parser.add_argument('checkpoint', help="checkpoint: ours, or one of the authors' segmentors")
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write, or folder if IMAGE is one (default: in predictions/)',
    )
    parser.add_argument('--device', help='default: a GPU if there is one, else cpu')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='lowest score of a detection that is drawn (default: %(default)s)',
    )
    return parser


def find_images(image: Path, out: Path | None) -> list[tuple[Path, Path]]:
    """Return pairs of a file to read and a file to write.

    Raises:
        UsageError: If there is no such image, no image in the folder, or ``out`` is no image file.
    """
    if image.is_dir():
        found = sorted(path for path in image.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise UsageError(f'no image ({", ".join(SUFFIXES)}) in {image}')
        folder = out or Path('predictions') / image.resolve().name
        return [(path, folder / path.name) for path in found]
    if not image.is_file():
        raise UsageError(f'there is no image {image}')
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--out must end in one of {", ".join(SUFFIXES)}, got {out}')
    return [(image, out or Path('predictions') / image.name)]


def load_config(path: str) -> Config:
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    if cfg.get('default_scope') not in TASKS:
        raise UsageError(
            f'{path}: default_scope must be one of {", ".join(TASKS)}, since it names the task; '
            f'got {cfg.get("default_scope")!r}'
        )
    return cfg


def build_model(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """Return the model in eval mode with all weights of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or does not fit backbone and heads.
    """
    import polynext_mm  # gives mmcv its operators, so before mmseg and mmdet
    from polynext_mm.weights import loading, read, safe_reading

    if cfg.default_scope == 'mmdet':
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import init_model as init
    with safe_reading():
        model = init(cfg, checkpoint, device=device)
    # The backbone checks itself on loading; mm merely warns about heads that do not fit.
    if isinstance(model.backbone, polynext_mm.backbones.MultiScale):
        loading.check(model, read(checkpoint)['state_dict'], checkpoint, evaluation=True)
    return model


def draw(model: nn.Module, source: Path, target: Path, score_thr: float) -> None:
    """Write an image with the predictions for it."""
    import mmcv
    from mmengine.registry import VISUALIZERS

    if model.cfg.default_scope == 'mmdet':
        from mmdet.apis import inference_detector as infer

        options = dict(pred_score_thr=score_thr)
    else:
        from mmseg.apis import inference_model as infer

        options = {}
    visualizer = VISUALIZERS.build(model.cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample(
        source.stem,
        mmcv.imread(str(source), channel_order='rgb'),
        infer(model, str(source)),
        draw_gt=False,
        out_file=str(target),
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from mmengine.device import get_device

    from polynext_mm.weights import CheckpointError

    device = args.device or get_device()
    try:
        images = find_images(args.image, args.out)
        model = build_model(load_config(find_config(args.config)), args.checkpoint, device)
    except (UsageError, CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    for source, target in images:
        draw(model, source, target, args.score_thr)
        print(target)
    return 0
