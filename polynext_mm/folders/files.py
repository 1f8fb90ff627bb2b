"""Find the image files of a folder, and inspect some of them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import FolderError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')
_SPLITS = {
    'train': 'train',
    'training': 'train',
    'val': 'val',
    'valid': 'val',
    'validation': 'val',
    'test': 'test',
    'testing': 'test',
}


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, except hidden ones, sorted."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (Path(place) / name for name in sorted(files) if not name.startswith('.'))


def images_below(folder: Path) -> list[Path]:
    """Return all image files below a folder, sorted."""
    return [path for path in walk(folder) if path.suffix.lower() in SUFFIXES]


def split_of(path: Path) -> str | None:
    """Return 'train', 'val' or 'test' if a part of a relative path says so, as in val2017."""
    for part in path.parts:
        for word in re.findall(r'[a-z]+', part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def image_size(path: Path) -> tuple[int, int]:
    """Return the width and height of an image as mm reads it, rotated by its EXIF data."""
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def spread(items: Sequence, count: int) -> list:
    """Return ``count`` evenly spaced items, first and last included, or all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def flatness(paths: Sequence[Path], count: int = 6) -> float:
    """Return the share of pixels that equal their right neighbours; in labels it is near 1."""
    shares = []
    for path in spread(paths, count):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        same = pixels[:, 1:] == pixels[:, :-1]
        shares.append(float((same.all(-1) if same.ndim == 3 else same).mean()))
    return float(np.mean(shares)) if shares else 0.0


def fingerprints(paths: Iterable[Path]) -> np.ndarray:
    """Return 256 bits of each image, (N, 32) uint8: where brightness rises from left to right.

    They change little when an image is scaled, compressed or brightened (Krawetz, "Kind of like
    that", 2013, with 64 bits).
    """
    rows = []
    for path in paths:
        with Image.open(path) as image:
            image.draft('L', (128, 128))  # decodes a JPEG no finer than needed
            small = (
                ImageOps.exif_transpose(image).convert('L').resize((17, 16), Image.Resampling.BOX)
            )
        pixels = np.asarray(small, np.int16)
        rows.append(np.packbits(pixels[:, 1:] > pixels[:, :-1]))
    return np.array(rows, np.uint8).reshape(-1, 32)


def listed_splits(root: Path, stems: Collection[str]) -> dict[str, set[str]]:
    """Return the names in the files train.txt, val.txt and test.txt below a folder.

    Those of VOC's ImageSets and of YOLO are found, with an image's path or name in each line. Names
    that belong to no image, such as those without a label, are left out.

    Args:
        root: The folder.
        stems: Names of the images. A file of which less than half of the lines names one of them is
            not a list of them.

    Raises:
        FolderError: If there are such lists, and several images of one name.
    """
    known = set(stems)
    found: dict[str, set[str]] = {}
    for path in walk(root):
        split = _SPLITS.get(path.stem) if path.suffix == '.txt' else None
        if split is None or path.stem in known:
            continue
        text = path.read_text(encoding='utf-8-sig', errors='replace')
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        names = [name for line in lines if (name := _listed_name(line, known)) is not None]
        if names and len(names) >= len(lines) / 2 and split not in found:
            found[split] = set(names)
    if not {'train', 'val'} <= found.keys():
        return {}
    if len(known) < len(stems):
        raise FolderError(
            f'{root} has lists of train and val, and several images of one name in its folders: '
            'give each image a name of its own'
        )
    return found


def _listed_name(line: str, known: Collection[str]) -> str | None:
    """Return the image that a line of a list names: by path or name, first or alone in the line."""
    for text in (line, line.split()[0]):
        name = text.replace('\\', '/').rpartition('/')[2]
        for candidate in (name, name.rpartition('.')[0]):
            if candidate in known:
                return candidate
    return None
