"""Export a model for other programs: ``polynext-mm export CONFIG CHECKPOINT --out model.onnx``.

The graph takes images of any batch, height and width. It is written to a temporary file, compared
with torch on several sizes, and only then renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from polynext_mm.runs import find_checkpoint
from polynext_mm.written import OverwriteError, require_apart

from .arguments import (
    UsageError,
    add_cfg_options,
    add_config,
    config_path,
    image_size,
    read_config,
)

SIZES = ((32, 32), (97, 131), (256, 192))
BATCHES = (1, 2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm export',
        description='Export a segmentor, a detector or a backbone for other programs',
        epilog='example: %(prog)s work_dirs/my_roofs --out roofs.onnx',
    )
    add_config(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help="checkpoint: ours, or one of the authors'; for features, of the backbone alone, too. "
        "In a work dir, 'best', 'last' or none for the best, else the newest",
    )
    parser.add_argument(
        '--out',
        type=Path,
        required=True,
        help='file to write: .onnx, or .pt2 for a program of torch.export',
    )
    parser.add_argument(
        '--output',
        choices=['features', 'logits', 'labels', 'boxes'],
        help='what the graph returns: features of the backbone, logits or labels of a segmentor, '
        'boxes and scores before nms of a detector (default: logits or boxes)',
    )
    parser.add_argument(
        '--preprocess',
        action='store_true',
        help="let the graph do the work of the config's data preprocessor (mean, std, BGR to RGB, "
        'padding): it then takes uint8 images',
    )
    parser.add_argument(
        '--aot',
        action='store_true',
        help='compile for this CPU with AOTInductor (.pt2; needs a C++ compiler, takes minutes)',
    )
    parser.add_argument(
        '--check-sizes',
        nargs='+',
        type=exported_size,
        metavar='HxW',
        default=SIZES,
        help='sizes to compare with torch on, batches of 1 and 2 in turn (default: '
        f'{" ".join(f"{h}x{w}" for h, w in SIZES)})',
    )
    parser.add_argument('--force', action='store_true', help='replace the file if it exists')
    add_cfg_options(parser)
    return parser


def exported_size(text: str) -> tuple[int, int]:
    """Convert HEIGHTxWIDTH of an image that a graph can take."""
    if min(size := image_size(text)) < 32:
        raise argparse.ArgumentTypeError(f'images must be at least 32x32, got {text}')
    return size


def choose_format(out: Path, aot: bool, force: bool) -> str:
    """Return the key of the format to write.

    Raises:
        UsageError: If the suffix of the file is not that of a format.
        FileExistsError: If the file exists and is not to be replaced.
    """
    if out.suffix not in ('.onnx', '.pt2') or (aot and out.suffix != '.pt2'):
        wanted = '.pt2 with --aot' if aot else '.onnx or .pt2'
        raise UsageError(f'--out must end in {wanted}, got {out}')
    if out.exists() and not force:
        raise FileExistsError(f'{out} exists: use --force to replace it')
    return 'aot' if aot else out.suffix[1:]


def export(args: argparse.Namespace) -> None:
    """Capture the graph, write it, check it, and put the file in its place.

    Raises:
        UsageError: If the arguments contradict each other.
        OSError: If the config or the checkpoint is not found, or the file exists already.
        CheckpointError: If the checkpoint does not fit.
        UnsupportedModelError: If the model cannot be exported as asked.
        ExportError: If something is not installed, or the graph fails its check.
    """
    key = choose_format(args.out, args.aot, args.force)

    from polynext_mm.deployment import (
        FORMATS,
        capture,
        check,
        fused,
        make_network,
        open_file,
        write_file,
    )

    form = FORMATS[key]
    form.require()
    model, classes = load(args)
    with quiet():
        network = make_network(model, args.output, args.preprocess)
        print('capturing the graph', flush=True)
        program = capture(fused(network), form.with_hints)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.export-', dir=args.out.parent) as folder:
            beside = Path(folder) / args.out.name
            print('writing', args.out, flush=True)
            write_file(form, program, network, beside, {'classes': classes} if classes else {})
            if importlib.util.find_spec(form.consumer) is None:
                print(f'not checked: {form.consumer} is not installed ({form.install})')
            else:
                shapes = [
                    (BATCHES[i % len(BATCHES)], *size) for i, size in enumerate(args.check_sizes)
                ]
                found = check(network, open_file(form, beside), shapes, str(args.out))
                version = importlib.metadata.version(form.consumer)
                print(
                    f'{form.consumer} {version} and torch differ, relative to the largest value, by'
                )
                for shape, value in zip(shapes, found):
                    print(f'  {value:.1e}  on images of {"x".join(map(str, shape))}')
            os.replace(beside, args.out)
    print(describe(network, args.out))


def load(args: argparse.Namespace):
    """Return the model, and the names of its classes if it has any."""
    path = config_path(args)
    args.checkpoint = find_checkpoint(args.config, args.checkpoint)
    require_apart([('--out', args.out)], [path, args.checkpoint])
    config = read_config(args)
    from polynext_mm.deployment.models import load_backbone
    from polynext_mm.inference.predictor import TASKS, build_model

    if args.output == 'features':
        model, report = load_backbone(config, args.checkpoint)
        print(report)
        return model, None
    if config.get('default_scope') not in TASKS:
        raise UsageError(
            f'{args.config}: default_scope must be one of {", ".join(TASKS)}, since it names the '
            f'task; got {config.get("default_scope")!r}. Features of a backbone need none'
        )
    model = build_model(config, args.checkpoint, 'cpu')
    return model, list(model.dataset_meta.get('classes') or ())


def describe(network, out: Path) -> str:
    """Return a line that says what a file takes and returns."""
    dtype = 'float32' if network.preprocessing is None else 'uint8'
    shapes = [
        f'{name} ({", ".join(axes)})' for name, axes in zip(network.output_names, network.out_axes)
    ]
    return (
        f'wrote {out}, {out.stat().st_size / 1e6:.1f} MB: images (batch, {network.in_channels}, '
        f'height, width), {dtype} -> {", ".join(shapes)}'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress expected log messages and warnings of torch and onnxscript."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from polynext_mm.deployment import ExportError, UnsupportedModelError
    from polynext_mm.engine.checks.config import ConfigError
    from polynext_mm.engine.console import few_lines
    from polynext_mm.weights import CheckpointError

    try:
        with few_lines():
            export(args)
    except (
        CheckpointError,
        ConfigError,
        ExportError,
        OSError,
        OverwriteError,
        UnsupportedModelError,
        UsageError,
    ) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    return 0
