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
        return pixels.astype(np.uint8) * IGNORED
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
        pixels: How many pixels have each value, over all images.
        images: How many images have each value.
        of: Values in each image, in order.
    """

    coloured: bool
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
    for path in paths:
        pixels = read_label(path)
        values, counts = np.unique(packed(pixels), return_counts=True)
        found.append((pixels.ndim == 3, dict(zip(values.tolist(), counts.tolist()))))
    coloured = any(is_coloured for is_coloured, _ in found)
    if coloured:  # an image of greys only, such as an all-black one, has one channel
        found = [
            (True, counts if is_coloured else {v * 0x10101: n for v, n in counts.items()})
            for is_coloured, counts in found
        ]
    result = Values(coloured, Counter(), Counter(), [])
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

    Without a table, black comes first, then the others by decreasing frequency.
    """
    if table is not None:
        return list(table)
    order = sorted(values.pixels, key=lambda value: (value != 0, -values.pixels[value]))
    return [
        Colour('background' if value == 0 else f'colour_{value:06x}', unpacked(value))
        for value in order
    ]
