"""Make demo/treecrowns: tiles of aerial photographs with boxes on the tree crowns, as COCO has it.

Photographs and boxes come out of the published Python package deepforest. Tiles of one photograph
train, tiles of three others, two of them from other places altogether, validate. The same sources
and the same Pillow give the same bytes.

    python demo/make_treecrowns.py
    python demo/make_treecrowns.py --source FOLDER_WITH_THE_WHEEL --out SOMEWHERE_ELSE
"""

import argparse
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from PIL import Image

from package_files import find_file, package_files

PACKAGE = 'deepforest==2.1.0'
PHOTOS = {
    'train': ('2019_YELL_2_528000_4978000_image_crop2',),
    'val': ('2019_YELL_2_541000_4977000_image_crop', 'OSBS_029', 'SOAP_061'),
}

TILE = 400  # pixels, roughly: every photograph is cut into equal parts
MIN_VISIBLE = 1 / 3  # of a box's area
JPEG_QUALITY = 88


def read_boxes(path):
    """Read the boxes of a VOC file as (N, 4) integers: left, top, right, bottom.

    VOC numbers pixels from 1 and its boxes include their last pixel. Ours count from 0 and end
    before theirs, so that right - left is the width. All labels (tree, alive, dead) are trees.
    """
    found = [
        [int(box.findtext(side)) for side in ('xmin', 'ymin', 'xmax', 'ymax')]
        for box in ET.parse(path).getroot().iter('bndbox')
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4) - [1, 1, 0, 0]


def cut_evenly(length):
    """Return the edges, in pixels, of the equal parts of about TILE pixels in `length`."""
    parts = max(1, round(length / TILE))
    return [index * length // parts for index in range(parts + 1)]


def clip_boxes(boxes, window):
    """Move boxes into a window, cut them at its edges and drop those with little left.

    Args:
        boxes (np.ndarray): (N, 4), left, top, right, bottom.
        window (tuple[int]): Left, top, right, bottom.

    Returns:
        np.ndarray: (M, 4) boxes that count from the window's corner. Of each, at least
        MIN_VISIBLE of the area lies in the window.
    """
    left, top, right, bottom = window
    clipped = np.clip(boxes, [left, top, left, top], [right, bottom, right, bottom])
    visible = _areas(clipped) >= MIN_VISIBLE * _areas(boxes)
    return clipped[visible] - [left, top, left, top]


def cut_photo(photo, boxes):
    """Yield (suffix, tile, boxes) for every tile of a photograph, also for those without trees.

    Args:
        photo (PIL.Image.Image): The photograph.
        boxes (np.ndarray): Its boxes, (N, 4).
    """
    rows, cols = cut_evenly(photo.height), cut_evenly(photo.width)
    for row, (top, bottom) in enumerate(itertools.pairwise(rows)):
        for col, (left, right) in enumerate(itertools.pairwise(cols)):
            window = left, top, right, bottom
            yield f'r{row}_c{col}', photo.crop(window), clip_boxes(boxes, window)


def make_split(photos, folder):
    """Write the tiles of some photographs to `folder` and return their COCO annotations.

    Args:
        photos (dict[str, tuple]): Name of each photograph to its image and boxes.
        folder (Path): Where the tiles go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A tile of an earlier run that this one does not make must not stay behind.
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
                # From 1, because COCO's evaluation takes a match with box 0 for no match.
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


def load_photo(folder, name):
    """Read a photograph as an RGB image, and its boxes, (N, 4)."""
    with Image.open(find_file(folder, f'{name}.png', PACKAGE)) as image:
        photo = image.convert('RGB')
    voc = find_file(folder, f'{name}.xml', PACKAGE)
    boxes = read_boxes(voc)
    if boxes.min(initial=0) < 0 or (boxes[:, 2:] > photo.size).any():
        raise SystemExit(
            f'{voc} has boxes outside of its photograph, which is '
            f'{photo.width} x {photo.height} pixels.'
        )
    return photo, boxes


def report(split, coco):
    """Say how many tiles and boxes a split got, and how large the boxes are."""
    sizes = [annotation['bbox'][2:] for annotation in coco['annotations']]
    width, height = np.median(sizes, axis=0)
    empty = len(coco['images']) - len({box['image_id'] for box in coco['annotations']})
    print(
        f'{split}: {len(coco["images"])} tiles, {empty} of them without trees; '
        f'{len(sizes)} boxes, median size {width:g} x {height:g} pixels'
    )


def main():
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
        default=Path(__file__).resolve().parents[1] / 'demo' / 'treecrowns',
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


def _areas(boxes):
    """Return the areas, (N,), of (N, 4) boxes; a clipped box that lies outside has none."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


if __name__ == '__main__':
    main()
