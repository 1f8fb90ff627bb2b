"""Make demo/treecrowns: tiles of aerial photographs with boxes on tree crowns, in COCO's layout.

Photographs and boxes are taken from the published Python package deepforest. Tiles of one
photograph are for training; tiles of three others, two of them from other places altogether, are
for validation. The same sources and the same version of Pillow give the same bytes.

    python demo/make_treecrowns.py
    python demo/make_treecrowns.py --source FOLDER_WITH_THE_WHEEL --out SOMEWHERE_ELSE
"""

import argparse
import itertools
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from package_files import find_file, package_files

PACKAGE = 'deepforest==2.1.0'
PHOTOS = {
    'train': ('2019_YELL_2_528000_4978000_image_crop2',),
    'val': ('2019_YELL_2_541000_4977000_image_crop', 'OSBS_029', 'SOAP_061'),
}

TILE = 400  # pixels, about: every photograph is cut into equal parts
MIN_VISIBLE = 1 / 3  # of the area of a box, for it to stay in a tile
JPEG_QUALITY = 88


def read_boxes(path: Path) -> np.ndarray:
    """Read the boxes of a VOC file as (N, 4) integers: left, top, right, bottom.

    VOC counts pixels from 1 and includes the last one in a box. Here they count from 0 and the last
    one is excluded, so that right - left is the width. All labels (tree, alive, dead) are trees.
    """
    found = [
        [int(box.findtext(side)) for side in ('xmin', 'ymin', 'xmax', 'ymax')]
        for box in ET.parse(path).getroot().iter('bndbox')
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4) - [1, 1, 0, 0]


def cut_evenly(length: int) -> list[int]:
    """Return the edges of the equal parts of about TILE pixels in ``length`` pixels."""
    parts = max(1, round(length / TILE))
    return [index * length // parts for index in range(parts + 1)]


def clip_boxes(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """Clip boxes to a window and drop those of which too little is left.

    Args:
        boxes: Left, top, right, bottom, in shape (N, 4).
        window: Left, top, right, bottom.

    Returns:
        Boxes (M, 4) relative to the window's corner, each with at least MIN_VISIBLE of its area.
    """
    left, top, right, bottom = window
    clipped = np.clip(boxes, [left, top, left, top], [right, bottom, right, bottom])
    visible = _areas(clipped) >= MIN_VISIBLE * _areas(boxes)
    return clipped[visible] - [left, top, left, top]


def cut_photo(
    photo: Image.Image, boxes: np.ndarray
) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Cut a photograph into tiles, including those without trees.

    Args:
        photo: The photograph.
        boxes: Its boxes, (N, 4).

    Yields:
        The suffix of a tile's name, its image and its boxes.
    """
    rows, cols = cut_evenly(photo.height), cut_evenly(photo.width)
    for row, (top, bottom) in enumerate(itertools.pairwise(rows)):
        for col, (left, right) in enumerate(itertools.pairwise(cols)):
            window = left, top, right, bottom
            yield f'r{row}_c{col}', photo.crop(window), clip_boxes(boxes, window)


def make_split(photos: dict[str, tuple[Image.Image, np.ndarray]], folder: Path) -> dict:
    """Write the tiles of photographs and return their annotations in COCO's format.

    Args:
        photos: Image and boxes of each photograph, by name.
        folder: For the tiles. Tiles that an earlier run left in it are deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob('*_r[0-9]_c[0-9].jpg'):
        stale.unlink()
    images, annotations = [], []
    for name, (photo, boxes) in photos.items():
        for suffix, tile, tile_boxes in cut_photo(photo, boxes):
            file_name = f'{name}_{suffix}.jpg'
            tile.save(folder / file_name, quality=JPEG_QUALITY, optimize=True)
            image_id = len(images) + 1
            images.append(
                {'id': image_id, 'file_name': file_name, 'width': tile.width, 'height': tile.height}
            )
            for left, top, right, bottom in tile_boxes.tolist():
                width, height = right - left, bottom - top
                # Ids start at 1: COCO's evaluation takes a match with box 0 for no match.
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': image_id,
                        'category_id': 1,
                        'bbox': [left, top, width, height],
                        'area': width * height,
                        'iscrowd': 0,
                    }
                )
    return {
        'info': {'description': f'Tree crowns, cut from the photographs of {PACKAGE}'},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 1, 'name': 'tree'}],
    }


def load_photo(folder: Path, name: str) -> tuple[Image.Image, np.ndarray]:
    """Read a photograph as an RGB image, and its boxes, (N, 4).

    Raises:
        SystemExit: If a file is missing, or boxes extend beyond the photograph.
    """
    with Image.open(find_file(folder, f'{name}.png', PACKAGE)) as image:
        photo = image.convert('RGB')
    voc = find_file(folder, f'{name}.xml', PACKAGE)
    boxes = read_boxes(voc)
    if boxes.min(initial=0) < 0 or (boxes[:, 2:] > photo.size).any():
        raise SystemExit(
            f'{voc} has boxes outside its photograph of {photo.width} x {photo.height} pixels'
        )
    return photo, boxes


def report(split: str, coco: dict) -> None:
    """Print how many tiles and boxes a split has, and how large the boxes are."""
    sizes = [annotation['bbox'][2:] for annotation in coco['annotations']]
    width, height = np.median(sizes, axis=0)
    empty = len(coco['images']) - len({box['image_id'] for box in coco['annotations']})
    print(
        f'{split}: {len(coco["images"])} tiles, {empty} of them without trees; '
        f'{len(sizes)} boxes, median size {width:g} x {height:g} pixels'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--source',
        type=Path,
        metavar='DIR',
        help=f'folder with the wheel of {PACKAGE}, or with its unpacked files '
        '(default: download it)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        default=Path(__file__).with_name('treecrowns'),
        help='folder to write to (default: demo/treecrowns)',
    )
    args = parser.parse_args()
    (args.out / 'annotations').mkdir(parents=True, exist_ok=True)
    with package_files([PACKAGE], args.source) as folder:
        for split, names in PHOTOS.items():
            photos = {name: load_photo(folder, name) for name in names}
            coco = make_split(photos, args.out / split)
            target = args.out / 'annotations' / f'instances_{split}.json'
            target.write_text(json.dumps(coco) + '\n')
            report(split, coco)


def _areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas, (N,), of boxes (N, 4); zero for a clipped box that lies outside."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


if __name__ == '__main__':
    main()
