"""Convert label images whose values are colours, or 0 and 255, to class ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import FolderError

IGNORED = 255
_MOST = 200  # with more values than this, images are not labels
_MOST_IN_ONE = 20  # values in an image
_TABLES = ('class_dict.csv', 'labelmap.txt', 'label_colors.txt', 'colors.txt', 'classes.csv')
_NAMES = ('classes.txt', 'labels.txt', 'names.txt', 'obj.names')
# comments in files that list names or colours
_COMMENT = ('#', '//')


class Colour(NamedTuple):
    """A class of colour-coded labels."""

    name: str
    rgb: tuple[int, int, int]


def read_label(path: Path) -> np.ndarray:
    """Return a label image: (H, W) of values, or (H, W, 3) of colours, uint8 or wider.

    A palette image (mode P) is read as its values, as mm reads it; grey colours become one channel.
    """
    with Image.open(path) as image:
        if image.mode in ('RGBA', 'LA', 'CMYK'):
            image = image.convert('RGB')
        pixels = np.asarray(image)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    return pixels


def packed(pixels: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) as one number each, 0xRRGGBB; values are unchanged."""
    if pixels.ndim == 2:
        return pixels.astype(np.int64)
    wide = pixels.astype(np.int64)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def unpacked(number: int) -> tuple[int, int, int]:
    """Return the colour of a number 0xRRGGBB."""
    return number >> 16, number >> 8 & 255, number & 255


class Values(NamedTuple):
    """What label images hold.

    Attributes:
        coloured: Whether values are colours, 0xRRGGBB, rather than those of one channel.
        has_channels: Whether a file has several channels, grey or not, which mm reads as no ids.
        pixels: How many pixels have each value, over all images.
        images: How many images have each value.
        of: Values in each image, in order.
    """

    coloured: bool
    has_channels: bool
    pixels: Counter[int]
    images: Counter[int]
    of: list[frozenset[int]]


def count_values(paths: Iterable[Path]) -> Values:
    """Read label images and count their values.

    Raises:
        FolderError: If they are not labels: there are hundreds of values, or colours in some and
            values in others.
    """
    paths = list(paths)
    found: list[tuple[bool, dict[int, int]]] = []
    has_channels = False
    for path in paths:
        with Image.open(path) as image:
            has_channels = has_channels or len(image.getbands()) > 1
        pixels = read_label(path)
        values, counts = np.unique(packed(pixels), return_counts=True)
        found.append((pixels.ndim == 3, dict(zip(values.tolist(), counts.tolist()))))
    coloured = any(is_coloured for is_coloured, _ in found)
    if coloured:  # an image of greys only, such as an all-black one, has one channel
        found = [
            (True, counts if is_coloured else {v * 0x10101: n for v, n in counts.items()})
            for is_coloured, counts in found
        ]
    result = Values(coloured, has_channels, Counter(), Counter(), [])
    for path, (_, counts) in zip(paths, found):
        result.pixels.update(counts)
        result.images.update(counts.keys())
        result.of.append(frozenset(counts))
        if len(result.pixels) > _MOST:
            raise FolderError(
                f'the labels hold more than {_MOST} values ({path} has {len(counts)}): they are '
                'no ids or colours of classes. If they were saved as JPEG, values are blurred: '
                'save them as PNG from the program that drew them'
            )
    return result


def numbered(values: Values, names: Sequence[str] = ()) -> tuple[list[str], dict[int, int]]:
    """Return the classes of labels of one channel, and the class of each value.

    0 and 255, or 0 and 1, are background and foreground. Values that are nearly consecutive are
    ids already; others are numbered in their order. 255 beside such ids is ignored.

    Args:
        values: Not colours.
        names: Of the classes, if they are known.

    Raises:
        FolderError: If names do not fit the values, or the values are those of smoothed edges.
    """
    there = sorted(values.pixels)
    if there == [0, IGNORED] or (there == [0, 1] and len(names) < 3):
        names = names or ('background', 'foreground')
        ids = {value: index for index, value in enumerate(there)}
        check_number(names, len(ids))
        return list(names), ids
    if not names:
        require_sharp(values)
    ignored = len(there) > 1 and there[-1] == IGNORED
    ignored = ignored and there[-2] < max(len(names), 2 * len(there))
    used = there[:-1] if ignored else there
    number = len(names) or len(used)
    # ids index the named classes, some of which may not occur, or are nearly consecutive
    if used[-1] < number or (not names and used[-1] < 2 * len(used) and not used[0]):
        names = names or [f'class_{i}' for i in range(used[-1] + 1)]
        ids = {value: value for value in range(len(names))}
    else:
        check_number(names or used, len(used))
        names = names or [f'class_{value}' for value in used]
        ids = {value: index for index, value in enumerate(used)}
    return list(names), ids | ({IGNORED: IGNORED} if ignored else {})


def check_number(names: Sequence, number: int) -> None:
    """Check that there is a name for each class.

    Raises:
        FolderError: If there are more or fewer.
    """
    if len(names) != number:
        raise FolderError(
            f'{len(names)} names of classes were given, and the labels hold {number} classes: '
            'name each with --classes'
        )


def require_sharp(values: Values) -> None:
    """Check that images do not have the many values of edges that a program has smoothed.

    Raises:
        FolderError: If most of them do.
    """
    number = sorted(map(len, values.of))[len(values.of) // 2]
    if number > _MOST_IN_ONE:
        raise FolderError(
            f'a label image holds {number} values (half of them hold more), such as those of '
            'smoothed edges: save masks from the program that drew them as PNG, without '
            'anti-aliasing'
        )


def colour_table(folder: Path) -> tuple[Path, list[Colour]] | None:
    """Return a folder's file of names and colours, and its contents, if there is one.

    These are the tables of CVAT (labelmap.txt), CamVid (label_colors.txt) and the like: a name
    and three numbers in each line, in any order.
    """
    for name in _TABLES:
        path = folder / name
        if path.is_file():
            table = parse_colours(path.read_text(encoding='utf-8-sig'))
            if table:
                return path, table
    return None


def parse_colours(text: str) -> list[Colour]:
    """Parse names and colours in lines such as ``road:128,64,128::`` and ``128 64 128 road``."""
    table = []
    for line in text.splitlines():
        numbers = re.search(r'(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})', line)
        name = re.search(r'[^\W\d][\w /-]*', line)
        if not line.startswith(_COMMENT) and numbers and name:
            red, green, blue = map(int, numbers.groups())
            table.append(Colour(name[0].strip(), (red, green, blue)))
    return table


def class_names(folder: Path) -> tuple[Path, list[str]] | None:
    """Return a folder's file with one class name per line, and the names, if there is one."""
    for name in _NAMES:
        path = folder / name
        if path.is_file():
            names = [line.strip() for line in path.read_text(encoding='utf-8-sig').splitlines()]
            return path, [line for line in names if line and not line.startswith(_COMMENT)]
    return None


def write_ids(source: Path, target: Path, ids: Mapping[int, int], coloured: bool) -> None:
    """Write a label image with ids in place of its values.

    Args:
        source: The label image.
        target: A PNG file; its folder is created.
        ids: The id of each value.
        coloured: Whether values are colours, 0xRRGGBB.

    Raises:
        FolderError: For a value that is not in ``ids``, naming file and value.
    """
    pixels = read_label(source)
    if coloured and pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, 2)
    values, inverse = np.unique(packed(pixels), return_inverse=True)
    missing = [value for value in values.tolist() if value not in ids]
    if missing:
        shown = ', '.join(str(unpacked(value) if coloured else value) for value in missing[:5])
        raise FolderError(f'{source} has values that are no class: {shown}')
    lookup = np.array([ids[value] for value in values.tolist()], np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(lookup[inverse].reshape(pixels.shape[:2])).save(target)


def named_colours(values: Values, table: Sequence[Colour] | None) -> list[Colour]:
    """Return the classes of colours: those of a table, or those that occur, named by their colour.

    Without a table they are in the order of red, green and blue, black first, in all folders alike.

    Raises:
        FolderError: If there is no table, and the colours are those of smoothed edges.
    """
    if table is not None:
        return list(table)
    require_sharp(values)
    return [
        Colour('background' if value == 0 else f'colour_{value:06x}', unpacked(value))
        for value in sorted(values.pixels)
    ]
