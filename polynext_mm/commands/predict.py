"""Draw a model's predictions: ``polynext-mm predict INPUT... CONFIG CHECKPOINT``.

INPUT is an image, a folder, a pattern such as ``'photos/*.jpg'``, a video or the number of a
camera. The config may be a segmentor's or a detector's. Images that cannot be read are named and
left out, and the exit code is then 1.

MMSegInferencer and DetInferencer are not used: they choose the names of the files they write,
MMSegInferencer holds the logits of a whole folder before it draws, and the images that they return
are resampled by matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm.resources import find_config

from .arguments import UsageError, add_cfg_options, add_config, positive
from .predict_inputs import Clip, Picture, find_inputs

DTYPES = ('float32', 'bfloat16', 'float16')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm predict', description="Draw a model's predictions into images"
    )
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help="an image, a folder, a pattern ('photos/*.jpg'), a video, or the number of a camera",
    )
    add_config(parser)
    parser.add_argument('checkpoint', help="checkpoint: ours, or one of the authors' segmentors")
    parser.add_argument(
        '--out',
        type=Path,
        help='file to write if INPUT is one image, video or camera, else folder '
        '(default: in predictions/)',
    )
    drawing = parser.add_argument_group('drawing')
    drawing.add_argument(
        '--opacity',
        type=_fraction,
        help="of what is drawn, 0 to 1 (default: the config's visualizer's alpha, or 0.8)",
    )
    drawing.add_argument(
        '--legend',
        action='store_true',
        help='name the classes in a strip below the picture instead of in it (segmentors)',
    )
    drawing.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='lowest score of a detection that is drawn or written (default: %(default)s)',
    )
    results = parser.add_argument_group('results besides pictures')
    results.add_argument(
        '--labels',
        type=Path,
        metavar='FOLDER',
        help='write the class of every pixel as PNG: indices into the classes (segmentors)',
    )
    results.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help="write boxes and masks in COCO's format, or the share of every class in every image",
    )
    how = parser.add_argument_group('how')
    how.add_argument('--batch-size', type=positive, default=1, help='images at once (default: 1)')
    how.add_argument('--device', help='default: a GPU if there is one, else cpu')
    how.add_argument('--dtype', choices=DTYPES, default='float32', help='half types by autocast')
    how.add_argument(
        '--slide',
        type=positive,
        metavar='SIZE',
        help='segment the image at its own size, in windows of SIZE that overlap by a third',
    )
    how.add_argument(
        '--max-frames', type=positive, help='end a video or camera after so many frames'
    )
    add_cfg_options(how)
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 1')
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        inputs = find_inputs(args.inputs, args.out)
        path = find_config(args.config)
    except (UsageError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')

    from polynext_mm.weights import CheckpointError

    from . import predict_outputs as outputs

    try:
        predictor = outputs.load(path, args)
        writer = outputs.Writer(predictor, args, inputs)
        broken = writer.draw_pictures([found for found in inputs if isinstance(found, Picture)])
    except (UsageError, CheckpointError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    for clip in inputs:
        if isinstance(clip, Clip):
            try:
                writer.draw_clip(clip, args.max_frames)
            except UsageError as error:
                broken.append(str(error))
    writer.finish()
    if broken:
        print(f'left out {len(broken)} of {len(inputs)}:', file=sys.stderr)
        print('\n'.join(f'  {fault}' for fault in broken), file=sys.stderr)
    return 1 if broken else 0
