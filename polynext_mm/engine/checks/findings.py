"""What can be wrong with a file, each in one line with the file's name, size, mode and a remedy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ...compat.optional import require
from ...compat.packages import MissingPackageError
from .decoding import LABELS, Decoder, is_turned_by_exif

IGNORED = 255
_POINTER = b'version https://git-lfs'
_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_SHOWN = 5
# What Pillow raises for a file that it cannot read.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class DataError(ValueError):
    """Data that cannot be used for training or evaluation. One line for each problem."""

    def __init__(self, message: str):
        # torch re-raises a worker's error with its traceback as the text, and the message in the
        # last line
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
    """Join the first few items, and say how many more there are."""
    items = list(items)
    more = f' and {len(items) - _SHOWN} more' if len(items) > _SHOWN else ''
    return ', '.join(map(str, items[:_SHOWN])) + more


def is_local(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path)


def described(path: str | os.PathLike) -> str:
    """Describe a file by its header: ``x.png (1203 bytes, PNG, 64x64, mode P)``."""
    if not is_local(path) or not os.path.isfile(path):
        return str(path)
    facts = [f'{os.path.getsize(path)} bytes']
    try:
        with Image.open(path) as image:
            facts += [image.format, f'{image.width}x{image.height}', f'mode {image.mode}']
    except UNREADABLE:  # file_fault reports files that are not images
        pass
    return f'{path} ({", ".join(facts)})'


def file_fault(path: str | os.PathLike) -> Finding | None:
    """Return why an image or label file cannot be read; None if it can."""
    name = described(path)
    if not os.path.exists(path):
        return Finding(f'there is no {name}', 'get it, or take it out of the list of the data set')
    if not os.path.isfile(path):
        kind = 'a folder' if os.path.isdir(path) else 'no file that can be read again'
        return Finding(f'{name} is {kind}', 'take it out of the folder of the data set')
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
        if head.startswith(_TIFF):
            return _strange_tiff(path, again)
        kind = 'a text or web page' if head.lstrip()[:1] in b'<{[' else 'no image of a known format'
        return Finding(f'{name} is {kind}', again)
    except UNREADABLE as error:
        return Finding(f'{name} is cut short or damaged ({error})', again)
    return None


def _strange_tiff(path: str | os.PathLike, again: str) -> Finding:
    """Return what to do with a TIFF that Pillow cannot read: with five channels, or floats."""
    try:
        shape = require('tifffile').imread(path).shape
    except MissingPackageError:
        return Finding(
            f'{path} is a TIFF that neither Pillow nor OpenCV can read, as of many channels',
            "`pip install tifffile`, and set imdecode_backend='tifffile' in every "
            'LoadImageFromFile (docs/own_data.md)',
        )
    except Exception as error:  # noqa: BLE001 - tifffile can raise anything
        return Finding(f'{path} is a TIFF that is cut short or damaged ({error})', again)
    return Finding(
        f'{path} is a TIFF of shape {shape} that neither Pillow nor OpenCV can read',
        "set imdecode_backend='tifffile', and for images color_type='unchanged', where every "
        'pipeline loads them (docs/own_data.md)',
    )


def opencv_fault(path: str | os.PathLike) -> Finding | None:
    """Return why OpenCV cannot decode a file that Pillow can, such as a truncated PNG."""
    if cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) is not None:
        return None
    return Finding(
        f'{described(path)} is cut short or damaged (OpenCV cannot decode it, though Pillow can)',
        'get the file again, or write it anew with a program that shows it',
    )


def loading_error(paths: Sequence[str | os.PathLike | None], error: Exception) -> DataError:
    """Return the error of a failed loading step, naming the file to blame.

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
    """Return what is wrong with a label image, without the name of the file.

    Args:
        label: As loaded, (H, W), after ``reduce_zero_label`` and with classes mapped.
        size: Height and width of the image; None if unknown.
        num_classes: Of the data set; None if it does not say.
        ignored: Ids that are no class and that the loss ignores.
        reduce_zero_label: Whether the file's ids were lowered by one.
    """
    if label.ndim < 2:  # mmseg drops dimensions of 1
        return Finding(
            'has a single row or column of pixels, and mmseg needs two of each',
            'take it and its image out of the data set',
        )
    if label.ndim > 2:
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
    """Return what to do about ids in the file that stand for no class."""
    if list(ids) == [num_classes] and not reduce_zero_label:
        return (
            'if ids count from 1, set reduce_zero_label=True in the data set; if '
            f'{num_classes} is a class of its own, add it to metainfo and num_classes'
        )
    return (
        f'write {IGNORED} where a pixel is to be ignored, or add the classes to metainfo.classes '
        'of the data set and num_classes of the heads'
    )


def size_fault(
    path: str | os.PathLike, size: tuple[int, int], listed_size: tuple[int, int]
) -> Finding:
    """Return a finding for an image whose size differs from the one in the annotations."""
    what = f'{path} ({times(size)}, listed as {times(listed_size)}'
    if size == tuple(listed_size[::-1]) and is_turned_by_exif(path, size):
        return Finding(
            f'{what}; EXIF turns it, and the boxes may be those of the unturned pixels)',
            "set color_type='color_ignore_orientation' in every LoadImageFromFile if the boxes are "
            'of the pixels as they are stored, or list width and height as turned if they are of '
            'the turned picture',
        )
    return Finding(
        f'{what})', 'check that width, height and boxes are those of the image that is loaded'
    )


def times(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'


def storage_fault(path: str | os.PathLike, decoder: Decoder = LABELS) -> Finding | None:
    """Return why mmseg reads ids that a label file does not hold: JPEG, or more than 8 bits."""
    with open(path, 'rb') as file:
        head = file.read(26)
    # a PNG's 25th byte is its bits per sample
    if head.startswith(b'\x89PNG') and head[24] <= 8:
        return None
    if head.startswith(b'\xff\xd8'):
        return lossy_label(path)
    with open(path, 'rb') as file:
        fault = value_fault(decoder.decode(file.read()))
    return fault and Finding(f'{described(path)} {fault.what}', fault.remedy)


def lossy_label(path: str | os.PathLike) -> Finding:
    return Finding(
        f'{described(path)} is a label in JPEG, whose compression changes ids',
        'write the labels as PNG, from their source and not from the JPEG',
    )


def value_fault(label: np.ndarray) -> Finding | None:
    """Return what mmseg would lose by keeping 8 bits of a label, without the name of the file.

    -1 passes, since it becomes 255, which is ignored.
    """
    if label.dtype in (np.uint8, np.bool_):
        return None
    if not np.isfinite(label).all():
        what = 'has pixels that are no number (nan or infinite)'
    elif (label != label.astype(np.int64)).any():
        what = f'has the fraction {label[label != label.astype(np.int64)][0]} for an id'
    elif label.min() < (-1 if label.dtype.kind == 'i' else 0):
        what = f'has ids down to {int(label.min())}'
    elif label.max() > IGNORED:
        what = f'has ids up to {int(label.max())}'
    else:
        return None
    return Finding(
        f'{what}, and mmseg keeps 8 bits of an id',
        f'write labels of 8 bits, ids mapped to classes and {IGNORED} where a pixel has none',
    )


def binary_fault(ids: Collection[int], num_classes: int | None) -> Finding | None:
    """Return what is wrong with labels that hold only 0 and 255, without their name.

    Args:
        ids: The ids that occur in the labels, with classes mapped.
        num_classes: Of the data set; None if it does not say.
    """
    if num_classes is None or num_classes < 2 or set(ids) != {0, IGNORED}:
        return None
    return Finding(
        f'hold nothing but 0 and {IGNORED}, of which {IGNORED} is ignored, so that class 1 never '
        'occurs and every prediction of 0 is right',
        f"if {IGNORED} is class 1, set type='OwnSegDataset' and label_map={{0: 0, {IGNORED}: 1}} "
        'in the data sets (docs/own_data.md)',
    )


def bits_finding(path: str | os.PathLike, bits: int) -> Finding:
    """Return a finding for an image that the pipeline reduces to 8 bits per sample."""
    with open(path, 'rb') as file:
        content = file.read()
    stored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    highest = '' if stored is None else f', values up to {stored.max()}'
    return Finding(
        f'{described(path)} has {bits} bits a sample{highest}, and the pipeline keeps 8 of them',
        "set color_type='unchanged' and to_float32=True in every LoadImageFromFile and mean and "
        'std of data_preprocessor in the units of the data, or write images of 8 bits '
        '(docs/own_data.md)',
        serious=False,
    )
