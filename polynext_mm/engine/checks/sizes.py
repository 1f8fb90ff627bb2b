"""Sizes of the images that a segmentor is evaluated on, where its pipeline determines them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import mmcv
import torch
from mmengine.config import Config
from PIL import Image

from .findings import Finding, listed

Size = tuple[int, int]  # width, height

# Memory per pixel of an image, in bytes, measured with UperNet on CPUs: mmseg holds the logits of
# every class twice; a head that sees the whole image needs the second number per channel.
_LOGITS = 8
_UPERNET = 2.7


def size_findings(cfg: Config, task: str, settings: Mapping, paths: Sequence[str]) -> list[Finding]:
    """Find images too small for the network or too large for memory, and batches of mixed sizes.

    Only headers are read, in tenths of a millisecond each. Nothing is reported if a pipeline step
    has an unknown effect on sizes, nor for small images that are padded.

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
    files = {path: size for path in paths if (size := _size(path)) is not None}
    sizes = {path: _scaled(size, steps) for path, size in files.items()}
    return [
        *_too_small(sizes, smallest),
        *_too_large(files, sizes, model),
        *_mixed(sizes, task, batch_size),
    ]


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


def _size(path: str) -> Size | None:
    """Return an image's size as mmcv loads it; None if the file is not an image."""
    try:
        with Image.open(path) as image:
            rotated = image.getexif().get(0x0112, 1) >= 5  # a quarter turn
            return image.size[::-1] if rotated else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # reported when samples are read


def _scaled(size: Size, steps: Sequence[Mapping]) -> Size:
    """Return an image's size after the pipeline."""
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


def _too_large(
    files: Mapping[str, Size], sizes: Mapping[str, Size], model: Mapping
) -> Iterator[Finding]:
    """Find the largest image if its evaluation is likely to run out of memory."""
    head, memory = model.get('decode_head'), _memory()
    if not files or not isinstance(head, Mapping) or memory is None:
        return
    path, (width, height) = max(files.items(), key=lambda item: item[1][0] * item[1][1])
    scaled = sizes[path][0] * sizes[path][1]
    # mmseg scales logits to the size of the file
    logits = _LOGITS * (head.get('num_classes') or 1) * max(scaled, width * height)
    features = 0.0
    whole = (model.get('test_cfg') or {}).get('mode', 'whole') == 'whole'
    if whole and head.get('type') == 'UPerHead':
        features = _UPERNET * head.get('channels', 0) * scaled
    if max(logits, features) > memory:
        remedy = 'cut such images into tiles'
        if features > memory > logits:
            remedy = (
                "set model.test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341))"
            )
        yield Finding(
            f'{path} has {width}x{height} pixels: to evaluate it takes about '
            f'{max(logits, features) / 1e9:.0f} GB of memory, and {memory / 1e9:.0f} GB are here',
            remedy,
            serious=False,
        )


def _memory() -> int | None:
    """Return the memory of the first GPU, or else of the machine, in bytes; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


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
