"""Accuracy of a classifier on ImageNet-1K, and its robustness: ``polynext-mm validate-imagenet``.

The networks of the authors' release, in any file that :func:`polynext_mm.weights.read` reads, and
timm's models. Images are resized, cropped and normalized by timm as the published figures were
measured. The benchmarks beside ImageNet-1K are those of the paper's table of robustness:

- ImageNet-A (arXiv 1907.07174) and ImageNet-R (arXiv 2006.16241) have 200 of the classes, and a
  prediction is the best of these, as their authors evaluate.
- ImageNet-Sketch (arXiv 1905.13549) has all classes.
- ImageNet-C (arXiv 1903.12261) has 15 corruptions in five severities. A corruption error is the
  mean error over the severities relative to AlexNet's, and mCE the mean of the 15. Its images are
  crops of 224x224 already, so they are only resized where the input of the model has another size.
"""

import argparse
import dataclasses
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..compat.optional import require_timm
from ..nn import ARCHS, PolyNeXtClassifier
from ..weights import PUBLISHED, CheckpointError, loading, names, read

_TIMM = 'timm://'
_CLASSES = 1000
_SEVERITIES = range(1, 6)

#: AlexNet's mean top-1 error on each corruption of ImageNet-C: what the authors of the benchmark
#: divide by (arXiv 1903.12261; github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    'gaussian_noise': 0.886428,
    'shot_noise': 0.894468,
    'impulse_noise': 0.922640,
    'defocus_blur': 0.819880,
    'glass_blur': 0.826268,
    'motion_blur': 0.785948,
    'zoom_blur': 0.798360,
    'snow': 0.866816,
    'frost': 0.826572,
    'fog': 0.819324,
    'brightness': 0.564592,
    'contrast': 0.853204,
    'elastic_transform': 0.646056,
    'pixelate': 0.717840,
    'jpeg_compression': 0.606500,
}
# Top-1 at 224x224 of timm's peers, as published by the authors of "MetaFormer Baselines for Vision"
# (arXiv 2210.13452).
_PEERS = {
    'convformer_s18.sail_in1k': 83.0,
    'convformer_s36.sail_in1k': 84.1,
    'convformer_m36.sail_in1k': 84.5,
    'caformer_s18.sail_in1k': 83.6,
    'caformer_s36.sail_in1k': 84.5,
    'caformer_m36.sail_in1k': 85.2,
}


class LayoutError(FileNotFoundError):
    """A folder does not hold a benchmark in the layout that was expected."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of labelled images.

    Args:
        name: As papers call it.
        option: Of the command line.
        images: Number of images, in ImageNet-C of each corruption and severity.
        layout: Where the images are below the folder of the benchmark.
        subset: Of timm's lists of classes, 'a' or 'r'; '' for all classes.
    """

    name: str
    option: str
    images: int
    layout: str
    subset: str = ''

    @property
    def wnids(self) -> list[str]:
        """The classes, by their names in WordNet."""
        return _timm_list(f'imagenet_{self.subset}_synsets' if self.subset else 'imagenet_synsets')

    @property
    def indices(self) -> list[int] | None:
        """Where the classes are among the 1000 of ImageNet-1K; None for all of them."""
        if not self.subset:
            return None
        return [int(line) for line in _timm_list(f'imagenet_{self.subset}_indices')]


BENCHMARKS = (
    Benchmark('ImageNet-1K', 'imagenet', 50000, 'n01440764/*.JPEG'),
    Benchmark('ImageNet-A', 'imagenet-a', 7500, 'n01498041/*.jpg', 'a'),
    Benchmark('ImageNet-R', 'imagenet-r', 30000, 'n01443537/*.jpg', 'r'),
    Benchmark('ImageNet-Sketch', 'imagenet-sketch', 50889, 'n01440764/*.JPEG'),
    Benchmark('ImageNet-C', 'imagenet-c', 50000, 'gaussian_noise/1/n01440764/*.JPEG'),
)


def _timm_list(name: str) -> list[str]:
    return pkgutil.get_data('timm.data', f'_info/{name}.txt').decode().split()


# Models


@dataclasses.dataclass(frozen=True)
class Subject:
    """A classifier and what is known of it.

    Args:
        name: Of the network.
        model: In eval mode; 1000 logits.
        transform: How images are prepared, as arguments of ``timm.data.create_loader``.
        published: Top-1 accuracy on ImageNet-1K in percent, or None.
    """

    name: str
    model: nn.Module
    transform: dict[str, Any]
    published: float | None = None


def load_subject(source: str) -> Subject:
    """Load a classifier.

    Args:
        source: ``polynext://NAME``, the path or url of a file, or ``timm://NAME`` with a name of
            ``timm.list_pretrained()``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If there is no such network, or it is no classifier of ImageNet-1K.
    """
    subject = _timm_subject(source) if source.startswith(_TIMM) else _polynext(source)
    subject.model.eval().requires_grad_(False)
    return subject


def _timm_subject(source: str) -> Subject:
    import timm
    from timm.data import resolve_model_data_config

    name = source.removeprefix(_TIMM)
    if not timm.is_model(name.partition('.')[0]):
        raise CheckpointError(f'timm has no model {name!r}: see timm.list_pretrained()')
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # no such tag, no network, a damaged file
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'timm cannot load {name} ({type(error).__name__}: {reason})'
        ) from error
    _require_all_classes(model.num_classes, source)
    return Subject(name, model, resolve_model_data_config(model), _PEERS.get(name))


def _polynext(source: str) -> Subject:
    import timm
    from timm.data import resolve_data_config

    import polynext_mm.timm  # noqa: F401 - registers how images are prepared

    weights, _ = names.split_backbone(read(source)['state_dict'])
    bias = next((weights[key] for key in ('head.3.bias', 'head.fc.bias') if key in weights), None)
    if bias is None:
        raise CheckpointError(
            f'{source} holds no classifier: give a file of the release for ImageNet, such as '
            'polynext://cpolynext_s'
        )
    try:
        arch = names.infer_arch(weights)
    except ValueError as error:
        raise CheckpointError(f'{source}: {error}') from error
    _require_all_classes(len(bias), source)
    norm = names.norm_of(weights)
    model = PolyNeXtClassifier(
        arch, norm=norm, norm_size=names.norm_size(weights, ARCHS[arch]) if norm == 'bn' else None
    )
    print(loading.adapt(model, weights, '', source), file=sys.stderr)
    model.load_state_dict(weights)
    published = next(
        file
        for file in PUBLISHED.values()
        if (file.arch, file.norm, file.holds) == (arch, norm, 'imagenet')
    )
    transform = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())
    return Subject(published.file.rpartition('.')[0], model, transform, published.figure)


def _require_all_classes(number: int, source: str) -> None:
    if number != _CLASSES:
        raise CheckpointError(
            f'{source} tells {number} classes apart, and ImageNet-1K has {_CLASSES}: it cannot be '
            'measured here'
        )


# Folders


def find_images(benchmark: Benchmark, folder: Path, partial: bool = False) -> list[Path]:
    """Return the folder of the classes of a benchmark; for ImageNet-C one for each condition.

    Args:
        benchmark: What is expected.
        folder: Of the benchmark. That of ImageNet-1K may be the parent of ``val``.
        partial: Accept that classes are missing.

    Returns:
        Of ImageNet-C the 75 folders of its corruptions, each in severities 1 to 5.

    Raises:
        LayoutError: If something else is there; the message says what was expected.
    """
    folder = folder.expanduser()
    if benchmark.option == 'imagenet' and (folder / 'val').is_dir():
        folder /= 'val'
    folders = [folder]
    if benchmark.option == 'imagenet-c':
        folders = [folder / name / str(level) for name in ALEXNET_ERRORS for level in _SEVERITIES]
    absent = [path for path in (folder, *folders) if not path.is_dir()]
    if absent:
        _complain(benchmark, folder, f'there is no folder {absent[0]}')
    wnids = benchmark.wnids
    for path in folders:
        present = {entry.name for entry in path.iterdir() if entry.is_dir()}
        missing = [wnid for wnid in wnids if wnid not in present]
        others = sorted(present - set(wnids))
        if len(missing) == len(wnids):
            _complain(benchmark, folder, f'none of its {len(wnids)} class folders is in {path}')
        if others:
            _complain(
                benchmark, folder, f'{path} has {len(others)} other folders, such as {others[0]}'
            )
        if missing and not partial:
            _complain(
                benchmark,
                folder,
                f'{len(missing)} of its {len(wnids)} class folders are not in {path}, such as '
                f'{missing[0]} (--partial measures the classes that are there)',
            )
    return folders


def _complain(benchmark: Benchmark, folder: Path, what: str) -> None:
    raise LayoutError(
        f'{folder} is not {benchmark.name}: {what}\n'
        f'  expected: {folder}/{benchmark.layout}, and so on for {len(benchmark.wnids)} classes'
        + (' and 15 corruptions, each in severities 1 to 5' if 'gauss' in benchmark.layout else '')
    )


class ImageError(OSError):
    """A file is not an image that can be read."""


class _Images(Dataset):
    """The images of a folder, by timm's reader.

    Unlike timm's own data set, which counts the next image in the place of a damaged one, this
    raises an error.

    Args:
        folder: With one folder for each class.
        class_map: Index of every class by the name of its folder.
    """

    def __init__(self, folder: Path, class_map: Mapping[str, int]):
        from timm.data.readers import create_reader

        try:
            self.reader = create_reader('', root=str(folder), class_map=class_map)
        except RuntimeError as error:  # no images at all
            raise LayoutError(str(error)) from error
        self.transform: Callable[[Any], Tensor] | None = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file, target = self.reader[index]
        try:
            with file, Image.open(file) as image:
                return self.transform(image.convert('RGB')), target
        except OSError as error:
            raise ImageError(f'{file.name} cannot be read as an image') from error


# Measuring


@dataclasses.dataclass(frozen=True)
class Score:
    """How many images were classified correctly."""

    images: int = 0
    first: int = 0
    among_five: int = 0

    def __add__(self, other: 'Score') -> 'Score':
        return Score(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * self.first / self.images

    @property
    def top5(self) -> float:
        """In percent."""
        return 100 * self.among_five / self.images


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How a model is run."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int


def score(
    subject: Subject, benchmark: Benchmark, folder: Path, conditions: Conditions, what: str
) -> Score:
    """Classify all images of a folder, with a progress bar on stderr."""
    from timm.data import create_loader
    from tqdm import tqdm

    transform = subject.transform
    if benchmark.option == 'imagenet-c':
        transform = {**transform, 'crop_pct': 1.0}
    wnids, indices = benchmark.wnids, benchmark.indices
    loader = create_loader(
        _Images(folder, {wnid: index for index, wnid in enumerate(wnids)}),
        **transform,
        batch_size=conditions.batch_size,
        num_workers=conditions.workers,
        persistent_workers=False,
        pin_memory=conditions.device.type == 'cuda',
        use_prefetcher=False,
    )
    total = Score()
    autocast = torch.autocast(
        conditions.device.type, conditions.dtype, enabled=conditions.dtype != torch.float32
    )
    bar = tqdm(total=len(loader.dataset), desc=what, unit='img')
    try:
        with torch.inference_mode(), bar:
            for images, targets in loader:
                with autocast:
                    logits = subject.model(images.to(conditions.device, non_blocking=True)).float()
                if indices is not None:
                    logits = logits[:, indices]
                hits = logits.topk(5).indices.cpu() == targets[:, None]
                total += Score(len(targets), int(hits[:, 0].sum()), int(hits.any(1).sum()))
                bar.update(len(targets))
    except ImageError as error:
        # of what a worker raises, torch makes a traceback that ends in the message
        raise ImageError(str(error).rpartition(f'{ImageError.__name__}: ')[2].strip()) from error
    return total


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured on a benchmark.

    Args:
        benchmark: Which.
        score: Over all images.
        errors: Of ImageNet-C, the top-1 error of each corruption, from 0 to 1.
    """

    benchmark: Benchmark
    score: Score
    errors: dict[str, float] | None = None

    @property
    def complete_images(self) -> int:
        """The number of images of the whole benchmark."""
        conditions = 1 if self.errors is None else len(ALEXNET_ERRORS) * len(_SEVERITIES)
        return self.benchmark.images * conditions

    @property
    def corruption_errors(self) -> dict[str, float]:
        """The error of each corruption relative to AlexNet's, in percent."""
        return {name: 100 * error / ALEXNET_ERRORS[name] for name, error in self.errors.items()}

    @property
    def mce(self) -> float | None:
        """The mean corruption error, in percent; None but for ImageNet-C."""
        if self.errors is None:
            return None
        return sum(self.corruption_errors.values()) / len(self.errors)


def measure(
    subject: Subject, benchmark: Benchmark, folders: Sequence[Path], conditions: Conditions
) -> Result:
    """Measure a classifier on a benchmark, whose folders are those of :func:`find_images`."""
    if benchmark.option != 'imagenet-c':
        return Result(benchmark, score(subject, benchmark, folders[0], conditions, benchmark.name))
    errors, total = {}, Score()
    for start, name in enumerate(ALEXNET_ERRORS):
        first = start * len(_SEVERITIES)
        scores = [
            score(subject, benchmark, folder, conditions, f'{name} {folder.name}')
            for folder in folders[first : first + len(_SEVERITIES)]
        ]
        errors[name] = sum(1 - score.top1 / 100 for score in scores) / len(scores)
        total = sum(scores, total)
    return Result(benchmark, total, errors)


# What is printed


def table(subject: Subject, results: Sequence[Result]) -> str:
    """Lay out what was measured beside what is published."""
    lines = [f'{"percent":<18}{"images":>9}{"published":>11}{"top-1":>9}{"top-5":>9}{"mCE":>9}']
    corruptions = []
    for result in results:
        published = subject.published if result.benchmark.option == 'imagenet' else None
        lines.append(
            f'{result.benchmark.name:<18}{result.score.images:>9}'
            f'{"-" if published is None else format(published, ".1f"):>11}'
            f'{result.score.top1:>9.2f}{result.score.top5:>9.2f}'
            + ('' if result.mce is None else f'{result.mce:>9.2f}')
        )
        if result.errors is not None:
            corruptions = [
                f'{name:<18}{100 * error:>9.2f}{result.corruption_errors[name]:>21.2f}'
                for name, error in result.errors.items()
            ]
            corruptions.insert(0, f'\n{"corruption":<18}{"error":>9}{"relative to AlexNet":>21}')
    notes = [
        f'note: {result.benchmark.name} has {result.complete_images} images, and '
        f'{result.score.images} were measured'
        for result in results
        if result.score.images != result.complete_images
    ]
    return '\n'.join(lines + corruptions + notes)


def as_json(subject: Subject, results: Iterable[Result], conditions: Conditions) -> dict:
    """Return what was measured, for ``json.dump``."""
    return dict(
        model=subject.name,
        published_top1=subject.published,
        transform=subject.transform,
        device=str(conditions.device),
        dtype=str(conditions.dtype).removeprefix('torch.'),
        results={
            result.benchmark.option: dict(
                images=result.score.images,
                complete_images=result.complete_images,
                top1=result.score.top1,
                top5=result.score.top5,
                **(
                    {}
                    if result.errors is None
                    else dict(
                        mce=result.mce,
                        errors={name: 100 * error for name, error in result.errors.items()},
                        corruption_errors=result.corruption_errors,
                    )
                ),
            )
            for result in results
        },
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm validate-imagenet',
        description='Measure a classifier on ImageNet-1K and on the benchmarks of robustness',
    )
    parser.add_argument(
        'model',
        help='polynext://NAME, the path or url of a file, or timm://NAME for a model of timm',
    )
    for benchmark in BENCHMARKS:
        parser.add_argument(
            f'--{benchmark.option}',
            type=Path,
            metavar='FOLDER',
            help=f'{benchmark.name}, with FOLDER/{benchmark.layout}',
        )
    parser.add_argument(
        '--partial',
        action='store_true',
        help='measure the classes that are there, where some are missing; no published figure '
        'compares with that',
    )
    parser.add_argument('--batch-size', type=_positive, default=64, help='default: %(default)s')
    parser.add_argument(
        '--workers', type=int, default=4, help='processes that load (default: %(default)s)'
    )
    parser.add_argument(
        '--device',
        type=torch.device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: %(default)s',
    )
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'float16'],
        default='float32',
        help='other than float32 is autocast (default: %(default)s)',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to a file too')
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive whole number, got {text!r}')
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = [
        (benchmark, folder)
        for benchmark in BENCHMARKS
        if (folder := getattr(args, benchmark.option.replace('-', '_'))) is not None
    ]
    if not given:
        options = ', '.join(f'--{benchmark.option}' for benchmark in BENCHMARKS)
        parser.error(f'nothing to measure on: give the folder of at least one of {options}')
    conditions = Conditions(args.device, getattr(torch, args.dtype), args.batch_size, args.workers)
    try:
        require_timm()
        found = [
            (benchmark, find_images(benchmark, folder, args.partial)) for benchmark, folder in given
        ]
        subject = load_subject(args.model)
        subject.model.to(conditions.device)
        results = [measure(subject, *pair, conditions) for pair in found]
    except (CheckpointError, FileNotFoundError, ImageError, ImportError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    height, width = subject.transform['input_size'][1:]
    print(f'{subject.name} on {args.device} in {args.dtype}, images of {height}x{width}')
    print(table(subject, results))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(subject, results, conditions), indent=2) + '\n')
    return 0
