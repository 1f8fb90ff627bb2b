"""Draw what a model finds in pictures: ``tools/image_demo.py IMAGE CONFIG CHECKPOINT``.

The config may be a segmentor's or a detector's; IMAGE may be a folder of pictures.
"""

import argparse
import sys
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from torch import nn

import polynext_mm  # registers, and gives mmcv its operators, before mm is imported
from polynext_mm.weights import CheckpointError, files, loading, safe_reading

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
TASKS = ('mmseg', 'mmdet')


class UsageError(ValueError):
    """Something about the arguments that the user can put right."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw what a model finds in pictures')
    parser.add_argument('image', type=Path, help='a picture, or a folder of pictures')
    parser.add_argument('config', type=Path, help='config file of a segmentor or a detector')
    parser.add_argument('checkpoint', help="checkpoint: ours, or one of the authors' segmentors")
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write, or folder if IMAGE is one (default: below predictions/)',
    )
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='of the detections drawn (default: 0.3)'
    )
    return parser.parse_args()


def find_pictures(image: Path, out: Path | None) -> list[tuple[Path, Path]]:
    """Pairs of the file to read and the file to write.

    Raises:
        UsageError: If there is no such picture, or none in the folder.
    """
    if image.is_dir():
        found = sorted(path for path in image.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise UsageError(f'there is no picture ({", ".join(SUFFIXES)}) in {image}')
        folder = out or Path('predictions') / image.resolve().name
        return [(path, folder / path.name) for path in found]
    if not image.is_file():
        raise UsageError(f'there is no picture {image}')
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--out: a picture ends in one of {", ".join(SUFFIXES)}, got {out}')
    return [(image, out or Path('predictions') / image.name)]


def load_config(path: Path) -> Config:
    if not path.is_file():
        raise UsageError(f'there is no config {path}')
    cfg = Config.fromfile(path)
    if cfg.get('default_scope') not in TASKS:
        raise UsageError(
            f'{path}: default_scope must be one of {TASKS} to tell the task, '
            f'got {cfg.get("default_scope")!r}'
        )
    return cfg


def build_model(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """The model in eval mode, with all of the checkpoint's weights, or an error."""
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import init_model as init
    with safe_reading():
        model = init(cfg, checkpoint, device=device)
        if isinstance(
            model.backbone, polynext_mm.backbones.MultiScale
        ):  # mm only warns of heads that do not fit
            weights = files.read(checkpoint)['state_dict']
            loading.check(model, weights, checkpoint, evaluation=True)
    return model


def draw(model: nn.Module, source: Path, target: Path, score_thr: float) -> None:
    """Write the picture with what the model finds in it."""
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


def main() -> None:
    args = parse_args()
    try:
        pictures = find_pictures(args.image, args.out)
        model = build_model(load_config(args.config), args.checkpoint, args.device)
    except (UsageError, CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    for source, target in pictures:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(model, source, target, args.score_thr)
        print(target)


if __name__ == '__main__':
    main()
