"""Measure classifiers on the benchmarks of ``imagenet_benchmarks``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..compat.torch_features import autocast
from ..nn import ARCHS, PolyNeXtClassifier
from ..weights import CheckpointError, loading, names, read
from .imagenet_benchmarks import ALEXNET_ERRORS, SEVERITIES, Benchmark, LayoutError
from .imagenet_published import published_figures

_TIMM = 'timm://'
_CLASSES = 1000
# The release prepares ImageNet-R with bilinear interpolation, and all others with bicubic
# (github.com/jjwang8/PolyNeXt, robustness/validate_imagenet_*.py; ImageNet-Sketch: validate.py).
_CHANGES = {'imagenet-r': {'interpolation': 'bilinear'}}


# Models


@dataclasses.dataclass(frozen=True)
class Subject:
    """A classifier and what is known about it.

    Args:
        name: Of the network.
        model: In eval mode, with 1000 logits.
        transform: How images are prepared, as arguments of ``timm.data.create_loader``.
        published: Figures in percent by the option of the benchmark: mCE on ImageNet-C, top-1
            elsewhere.
        changes: What differs from ``transform`` on a benchmark, by its option.
    """

    name: str
    model: nn.Module
    transform: dict[str, Any]
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def transform_for(self, benchmark: Benchmark) -> dict[str, Any]:
        """Return the transform for the images of a benchmark."""
        uncropped = {'crop_pct': 1.0} if benchmark.option == 'imagenet-c' else {}
        return {**self.transform, **uncropped, **self.changes.get(benchmark.option, {})}


def load_subject(source: str) -> Subject:
    """Load a classifier.

    Args:
        source: ``polynext://NAME``, the path or url of a file, or ``timm://NAME`` with a name from
            ``timm.list_pretrained()``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If there is no such network, or it is not an ImageNet-1K classifier.
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
    return Subject(name, model, resolve_model_data_config(model), published_figures(name))


def _polynext(source: str) -> Subject:
    import timm
    from timm.data import resolve_data_config

    from ..timm import IMAGENET_ARCHS, network_name  # registers how images are prepared

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
    if arch not in IMAGENET_ARCHS:
        raise CheckpointError(f'{source} is of arch {arch!r}, which is not one for ImageNet')
    norm = names.norm_of(weights)
    model = PolyNeXtClassifier(
        arch, norm=norm, norm_size=names.norm_size(weights, ARCHS[arch]) if norm == 'bn' else None
    )
    print(loading.adapt(model, weights, '', source), file=sys.stderr)
    model.load_state_dict(weights)
    transform = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(arch).to_dict())
    name = network_name(arch, norm)
    return Subject(name, model, transform, published_figures(name), _CHANGES)


def _require_all_classes(number: int, source: str) -> None:
    if number != _CLASSES:
        raise CheckpointError(
            f'{source} tells {number} classes apart, and ImageNet-1K has {_CLASSES}: it cannot be '
            'measured here'
        )


# Images


class ImageError(OSError):
    """A file is not an image that can be read."""


class _Images(Dataset):
    """The images of a folder, read by timm.

    A damaged image raises an error; timm's own data set would silently use the next one.

    Args:
        folder: The folder, with a subfolder for each class.
        class_map: Index of every class by the name of its folder.
    """

    def __init__(self, folder: Path, class_map: Mapping[str, int]):
        from timm.data.readers import create_reader

        try:
            self.reader = create_reader('', root=str(folder), class_map=class_map)
        except RuntimeError as error:  # raised if there are no images at all
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

    def __add__(self, other: Score) -> Score:
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

    wnids, indices = benchmark.wnids, benchmark.indices
    loader = create_loader(
        _Images(folder, {wnid: index for index, wnid in enumerate(wnids)}),
        **subject.transform_for(benchmark),
        batch_size=conditions.batch_size,
        num_workers=conditions.workers,
        persistent_workers=False,
        pin_memory=conditions.device.type == 'cuda',
        use_prefetcher=False,
    )
    total = Score()
    precision = autocast(conditions.device.type, conditions.dtype)
    bar = tqdm(total=len(loader.dataset), desc=what, unit='img')
    try:
        with torch.inference_mode(), bar:
            for images, targets in loader:
                with precision:
                    logits = subject.model(images.to(conditions.device, non_blocking=True)).float()
                if indices is not None:
                    logits = logits[:, indices]
                hits = logits.topk(5).indices.cpu() == targets[:, None]
                total += Score(len(targets), int(hits[:, 0].sum()), int(hits.any(1).sum()))
                bar.update(len(targets))
    except ImageError as error:
        # torch turns a worker's error into a traceback that ends in its message
        raise ImageError(str(error).rpartition(f'{ImageError.__name__}: ')[2].strip()) from error
    return total


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured on a benchmark.

    Args:
        benchmark: The benchmark.
        score: The score over all images.
        errors: For ImageNet-C, the top-1 error on each corruption, from 0 to 1.
    """

    benchmark: Benchmark
    score: Score
    errors: dict[str, float] | None = None

    @property
    def complete_images(self) -> int:
        """Return the number of images of the whole benchmark."""
        conditions = 1 if self.errors is None else len(ALEXNET_ERRORS) * len(SEVERITIES)
        return self.benchmark.images * conditions

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Return the error on each corruption relative to AlexNet's, in percent."""
        return {name: 100 * error / ALEXNET_ERRORS[name] for name, error in self.errors.items()}

    @property
    def mce(self) -> float | None:
        """Return the mean corruption error, in percent; None except for ImageNet-C."""
        if self.errors is None:
            return None
        return sum(self.corruption_errors.values()) / len(self.errors)


def measure(
    subject: Subject, benchmark: Benchmark, folders: Sequence[Path], conditions: Conditions
) -> Result:
    """Measure a classifier on a benchmark, in the folders from :func:`find_images`."""
    if benchmark.option != 'imagenet-c':
        return Result(benchmark, score(subject, benchmark, folders[0], conditions, benchmark.name))
    errors, total = {}, Score()
    for start, name in enumerate(ALEXNET_ERRORS):
        first = start * len(SEVERITIES)
        scores = [
            score(subject, benchmark, folder, conditions, f'{name} {folder.name}')
            for folder in folders[first : first + len(SEVERITIES)]
        ]
        errors[name] = sum(1 - score.top1 / 100 for score in scores) / len(scores)
        total = sum(scores, total)
    return Result(benchmark, total, errors)


# What is printed


def table(subject: Subject, results: Sequence[Result]) -> str:
    """Lay out measured figures beside published ones."""
    lines = [
        f'{"percent":<18}{"images":>9}{"published":>11}{"top-1":>9}{"top-5":>9}'
        f'{"published":>11}{"mCE":>9}'
    ]
    corruptions = []
    for result in results:
        figure = subject.published.get(result.benchmark.option)
        published = f'{"-" if figure is None else format(figure, ".1f"):>11}'
        of_top1, of_mce = (published, '') if result.mce is None else (f'{"-":>11}', published)
        lines.append(
            f'{result.benchmark.name:<18}{result.score.images:>9}{of_top1}'
            f'{result.score.top1:>9.2f}{result.score.top5:>9.2f}{of_mce}'
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
        published=dict(subject.published),
        transform=subject.transform,
        device=str(conditions.device),
        dtype=str(conditions.dtype).removeprefix('torch.'),
        results={
            result.benchmark.option: dict(
                images=result.score.images,
                complete_images=result.complete_images,
                top1=result.score.top1,
                top5=result.score.top5,
                **_own_transform(subject, result.benchmark),
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


def _own_transform(subject: Subject, benchmark: Benchmark) -> dict:
    transform = subject.transform_for(benchmark)
    return {} if transform == subject.transform else dict(transform=transform)
