"""Draw a model's predictions: ``polynext-mm predict INPUT... WORK_DIR``.

INPUT is an image, a folder, a pattern such as ``'photos/*.jpg'``, a video or the number of a
camera. The model, a segmentor or detector, is a work dir, or a config and a checkpoint. Images
that cannot be read are named and left out, and the exit code is then 1.

:class:`polynext_mm.Predictor` does the work; this module handles arguments, files and progress.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm.resources import find_config
from polynext_mm.runs import find_checkpoint, is_work_dir
from polynext_mm.written import OverwriteError, require_apart

from .arguments import UsageError, add_cfg_options, positive
from .predict_inputs import Picture, find_inputs, label_stems, sources

DTYPES = ('float32', 'bfloat16', 'float16')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm predict',
        usage='%(prog)s INPUT... WORK_DIR [CHECKPOINT] [options]\n'
        '       %(prog)s INPUT... CONFIG CHECKPOINT [options]',
        description="Draw a model's predictions into images",
        epilog='example: %(prog)s photos/ work_dirs/my_config --json found.json',
    )
    parser.add_argument(
        'arguments',
        nargs='+',
        metavar='INPUT... MODEL',
        help="INPUT: an image, a folder, a pattern ('photos/*.jpg'), a video, or the number of a "
        'camera. MODEL: a work dir, with its best checkpoint, else its newest, unless one follows; '
        "or a config and a checkpoint: a file, 'best', 'last', or one of the authors' segmentors",
    )
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
        default=0.5,
        help='of what is drawn, 0 to 1 (default: %(default)s)',
    )
    drawing.add_argument(
        '--legend',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='name the classes: in a strip below the picture (segmentors), or at each box',
    )
    drawing.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detections with scores up to this are neither drawn nor written '
        '(default: %(default)s)',
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
    how.add_argument('--tta', action='store_true', help='average over flips and scales')
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


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str, str | None]:
    """Separate the inputs, the config or work dir, and the checkpoint.

    Raises:
        UsageError: If there are too few.
    """
    if len(arguments) > 1 and is_work_dir(arguments[-1]):
        return list(arguments[:-1]), arguments[-1], None
    if len(arguments) < 3:
        last = Path(arguments[-1])
        why = f'; {last} is a folder without a config (*.py)' if last.is_dir() else ''
        raise UsageError(f'predict takes INPUT... WORK_DIR, or INPUT... CONFIG CHECKPOINT{why}')
    return list(arguments[:-2]), arguments[-2], arguments[-1]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        inputs, model, name = split_arguments(args.arguments)
        found = find_inputs(inputs, args.out)
        stems = label_stems(found)
        config, checkpoint = find_config(model), find_checkpoint(model, name)
        targets = [('--out', one.target) for one in found]
        if args.labels is not None:
            targets += [
                ('--labels', args.labels / f'{stems[one]}.png')
                for one in found
                if isinstance(one, Picture)
            ]
        if args.json is not None:
            targets.append(('--json', args.json))
            args.json.parent.mkdir(parents=True, exist_ok=True)  # it is written last
        require_apart(targets, [*sources(found), config, checkpoint])
    except (UsageError, OverwriteError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')

    from polynext_mm.engine.checks.config import ConfigError
    from polynext_mm.engine.checks.findings import DataError
    from polynext_mm.engine.console import few_lines
    from polynext_mm.engine.results import all_files_of
    from polynext_mm.inference import Predictor
    from polynext_mm.weights import CheckpointError

    from .predict_outputs import Writer

    with few_lines():
        try:
            predictor = Predictor(
                config,
                checkpoint,
                args.device,
                args.dtype,
                batch_size=args.batch_size,
                tta=args.tta,
                slide=args.slide,
                score_thr=args.score_thr,
                cfg_options=args.cfg_options,
            )
            if predictor.detects and args.labels is not None:
                raise UsageError(f'--labels is for segmentors, and {config} is a detector')
            require_apart(targets, all_files_of(predictor.model.cfg, with_images=False))
        except (
            UsageError,
            OverwriteError,
            CheckpointError,
            ConfigError,
            DataError,
            FileNotFoundError,
        ) as error:
            sys.exit(f'{type(error).__name__}: {error}')
        writer = Writer(predictor, args, stems)
        try:
            broken = writer.write(found)
        finally:
            writer.finish()  # write what was found so far
    if broken:
        print(f'left out {len(broken)} of {len(found)}:', file=sys.stderr)
        print('\n'.join(f'  {fault}' for fault in broken), file=sys.stderr)
    return 1 if broken else 0
