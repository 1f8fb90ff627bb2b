"""Sizes of the images that a segmentor is evaluated on, as far as its pipeline tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mmcv
from mmengine.config import Config
from PIL import Image

from .findings import Finding, listed

Size = tuple[int, int]  # width, height


def size_findings(cfg: Config, task: str, settings: Mapping, paths: Sequence[str]) -> list[Finding]:
    """Find images that are too small for the network, and batches that mix sizes.

    Only headers are read, in tenths of a millisecond each. Nothing is reported if the effect of a
    step of the pipeline on sizes is not known, nor for small images that are padded.

    Args:
        cfg: The whole config.
        task: 'val' or 'test'.
        settings: The settings of the data set.
        paths: Paths of its images.
    """
    steps = [step for step in settings.get('pipeline') or () if isinstance(step, Mapping)]
    model = cfg.get('model') or {}
    padded = (model.get('data_preprocessor') or {}).get('test_cfg') or {}
    if any(not _keeps_or_scales(step) for step in steps):
        return []
    smallest = None if padded else _smallest_image(model)
    batch_size = cfg[f'{task}_dataloader'].get('batch_size', 1)
    if smallest is None and batch_size == 1:
        return []
    sizes = {path: size for path in paths if (size := _size(path, steps)) is not None}
    return [*_too_small(sizes, smallest), *_mixed(sizes, task, batch_size)]


def _keeps_or_scales(step: Mapping) -> bool:
    kind = str(step.get('type')).split('.')[-1]
    if kind == 'Resize':
        return 'scale' in step or 'scale_factor' in step
    return kind.startswith(('Load', 'Pack'))


def _smallest_image(model: Mapping) -> int | None:
    """Return the smallest side that a backbone of this package takes; None for other backbones."""
    from ...backbones.multiscale import SMALLEST_IMAGE

    kind = (model.get('backbone') or {}).get('type')
    return SMALLEST_IMAGE if kind in ('PolyNeXt', 'MetaFormer') else None


def _size(path: str, steps: Sequence[Mapping]) -> Size | None:
    """Return an image's size after the pipeline; None if the file is no image."""
    try:
        with Image.open(path) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # rotated by a quarter turn, as mmcv loads it
                size = size[::-1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # reported when samples are read
    for step in steps:
        if str(step.get('type')).split('.')[-1] != 'Resize':
            continue
        scale = step.get('scale')
        if scale is None:
            factor = step['scale_factor']
            factors = factor if isinstance(factor, (list, tuple)) else (factor, factor)
            scale = tuple(int(side * by) for side, by in zip(size, factors))
        elif isinstance(scale, int):
            scale = (scale, scale)
        size = mmcv.rescale_size(size, scale) if step.get('keep_ratio') else tuple(scale)
    return size


def _too_small(sizes: Mapping[str, Size], smallest: int | None) -> Iterator[Finding]:
    if smallest is None:
        return
    small = [f'{path}: {w}x{h}' for path, (w, h) in sizes.items() if min(w, h) < smallest]
    if small:
        yield Finding(
            f'{len(small)} of {len(sizes)} images reach the network with less than {smallest} '
            f'pixels in height or width ({listed(small)})',
            'let it pad them: model.data_preprocessor.test_cfg=dict(size_divisor='
            f'{smallest}), or take them out of the data set',
        )


def _mixed(sizes: Mapping[str, Size], task: str, batch_size: int) -> Iterator[Finding]:
    paths = list(sizes)
    for start in range(0, len(paths) if isinstance(batch_size, int) else 0, batch_size):
        batch = paths[start : start + batch_size]
        if len({sizes[path] for path in batch}) > 1:
            shown = listed(f'{path}: {sizes[path][0]}x{sizes[path][1]}' for path in batch)
            yield Finding(
                f'{task}_dataloader.batch_size={batch_size}, and images of a batch differ in size: '
                f'{shown}',
                f'set {task}_dataloader.batch_size=1',
            )
            return
