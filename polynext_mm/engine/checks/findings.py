"""What can be wrong with a file, in one line with its name, its size, its mode and a remedy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

IGNORED = 255
_POINTER = b'version https://git-lfs'
_SHOWN = 5


class DataError(ValueError):
    """Data that cannot be trained on or evaluated with. One line for each problem."""

    def __init__(self, message: str):
        # torch turns what a worker raises into the text of its traceback, whose last line is the
        # message
        if message.startswith('Caught '):
            message = message.rpartition('DataError: ')[2].strip()
        super().__init__(message)


class Finding(NamedTuple):
    """Something worth knowing about a data set.

    Attributes:
        what: What was found, and where.
        remedy: What to do.
        serious: Whether training would fail or go silently wrong.
    """

    what: str
    remedy: str
    serious: bool = True

    def __str__(self) -> str:
        return f'{self.what}: {self.remedy}'


def listed(items: Iterable) -> str:
    """The first few, and how many more."""
    items = list(items)
    more = f' and {len(items) - _SHOWN} more' if len(items) > _SHOWN else ''
    return ', '.join(map(str, items[:_SHOWN])) + more


def is_local(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path)


def described(path: str | os.PathLike) -> str:
    """A file with what its first bytes say: ``x.png (1203 bytes, PNG, 64x64, mode P)``."""
    if not is_local(path) or not os.path.isfile(path):
        return str(path)
    facts = [f'{os.path.getsize(path)} bytes']
    try:
        with Image.open(path) as image:
            facts += [image.format, f'{image.width}x{image.height}', f'mode {image.mode}']
    except (OSError, ValueError, SyntaxError):  # what it is not, file_fault says
        pass
    return f'{path} ({", ".join(facts)})'


def file_fault(path: str | os.PathLike) -> Finding | None:
    """Why an image or label file cannot be read; None if it can."""
    name = described(path)
    if not os.path.exists(path):
        return Finding(f'there is no {name}', 'get it, or take it out of the list of the data set')
    if not os.path.isfile(path):
        return Finding(f'{name} is a folder', 'take it out of the folder of the data set')
    with open(path, 'rb') as file:
        head = file.read(64)
    again = 'get the file again, or take it and its label out of the data set'
    if not head:
        return Finding(f'{name} is empty', again)
    if head.startswith(_POINTER):
        return Finding(f'{name} is a pointer of git-lfs', 'fetch the file itself: git lfs pull')
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        kind = 'a text or web page' if head.lstrip()[:1] in b'<{[' else 'no image of a known format'
        return Finding(f'{name} is {kind}', again)
    except (OSError, ValueError, SyntaxError) as error:
        return Finding(f'{name} is cut short or damaged ({error})', again)
    return None


def opencv_fault(path: str | os.PathLike) -> Finding | None:
    """Why OpenCV cannot decode a file that Pillow can, such as a PNG without its end."""
    if cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) is not None:
        return None
    return Finding(
        f'{described(path)} is cut short or damaged (OpenCV cannot decode it, though Pillow can)',
        'get the file again, or write it anew with a program that shows it',
    )


def loading_error(paths: Sequence[str | os.PathLike | None], error: Exception) -> DataError:
    """The error of a failed loading step with the file that is to blame.

    Args:
        paths: Files of the sample.
        error: What the loading step raised.
    """
    local = [path for path in paths if is_local(path)]
    for find in (file_fault, opencv_fault):
        for path in local:
            fault = find(path)
            if fault:
                return DataError(str(fault))
    reason = ' '.join(str(error).split())
    names = ' and '.join(described(path) for path in local) or ' and '.join(map(str, paths))
    return DataError(f'{names} could not be loaded: {type(error).__name__}: {reason}')


def label_fault(
    label: np.ndarray,
    size: Sequence[int] | None,
    num_classes: int | None,
    ignored: Collection[int] = (IGNORED,),
    reduce_zero_label: bool = False,
) -> Finding | None:
    """What is wrong with a label image, without the name of the file.

    Args:
        label: As it was loaded, with zero reduced and classes mapped, in shape (H, W).
        size: Height and width of the image; None if unknown.
        num_classes: Of the data set; None if it does not say.
        ignored: Ids that are no class and are ignored by the loss.
        reduce_zero_label: Whether ids of the file were counted down by one.
    """
    if label.ndim != 2:
        return Finding(
            f'is a picture of {label.shape[-1]} channels, and a label has one class id for each '
            'pixel',
            'write labels as images of one channel (mode L or P), colours replaced by ids',
        )
    if size is not None and label.shape != tuple(size[:2]):
        return Finding(
            f'has {label.shape[1]}x{label.shape[0]} pixels and its image {size[1]}x{size[0]}',
            'make both the same size (labels with nearest neighbour), or check that they belong '
            'together',
        )
    if num_classes is None:
        return None
    outside = label >= num_classes
    for value in ignored:
        outside &= label != value
    if not outside.any():
        return None
    ids = [int(value) for value in np.unique(label[outside])]
    in_file = [value + 1 for value in ids] if reduce_zero_label else ids
    first = int(reduce_zero_label)
    return Finding(
        f'has the ids {listed(in_file)} on {outside.mean():.1%} of its pixels, and the '
        f'{num_classes} classes have {first} to {num_classes - 1 + first}',
        id_remedy(in_file, num_classes, reduce_zero_label),
    )


def id_remedy(ids: Collection[int], num_classes: int, reduce_zero_label: bool) -> str:
    """What to do about ids (of the file) that are no class."""
    if list(ids) == [num_classes] and not reduce_zero_label:
        return (
            'if ids count from 1, set reduce_zero_label=True in the data set; if '
            f'{num_classes} is a class of its own, add it to metainfo and num_classes'
        )
    return (
        f'write {IGNORED} where a pixel is to be ignored, or add the classes to metainfo.classes '
        'of the data set and num_classes of the heads'
    )


def bits_lost(path: str | os.PathLike) -> Finding | None:
    """Ids beyond 255: mmseg keeps the last 8 bits of a label, which makes other classes of them."""
    with open(path, 'rb') as file:
        head = file.read(26)
    # PNG says the bits of a sample in the 25th byte
    if not head.startswith(b'\x89PNG') or head[24:25] != b'\x10':
        return None
    with Image.open(path) as image:
        largest = int(np.asarray(image).max())
    if largest <= IGNORED:
        return None
    return Finding(
        f'{described(path)} has ids up to {largest}, and mmseg keeps 8 bits of an id',
        'write labels of 8 bits, ids of more than 255 mapped to classes',
    )
