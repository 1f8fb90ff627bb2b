"""A small generated data set in COCO's layout: shapes on noise, with exact masks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

SHAPES = ('rectangle', 'ellipse', 'triangle')
COLOURS = ((220, 60, 50), (60, 200, 80), (70, 90, 230))


def make_coco(
    root: Path,
    classes: Sequence[str],
    train: int = 4,
    val: int = 2,
    size: tuple[int, int] = (128, 128),
    objects: int = 3,
    seed: int = 0,
) -> Path:
    """Write ``train2017``, ``val2017`` and ``annotations`` below ``root``, and return it.

    Masks are polygons and run lengths in turn.

    Args:
        root: Root of the data set.
        classes: Names of all categories; the first three occur, with one shape each.
        train: Number of training images.
        val: Number of validation images.
        size: Width and height of the images.
        objects: Objects per image, at most 4.
        seed: Seed of the generator.
    """
    rng = np.random.default_rng(seed)
    (root / 'annotations').mkdir(parents=True)
    for split, count in (('train2017', train), ('val2017', val)):
        (root / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            picture, found = _draw(rng, size, objects)
            name = f'{image_id:03d}.png'
            picture.save(root / split / name)
            images.append(dict(id=image_id, file_name=name, width=size[0], height=size[1]))
            annotations += [
                dict(id=len(annotations) + i, image_id=image_id, iscrowd=0, **annotation)
                for i, annotation in enumerate(found, start=1)
            ]
        categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    return root


def data_options(root: Path) -> list[str]:
    """Return ``--cfg-options`` that make a COCO config read the data set, without workers."""
    options = [
        f'val_evaluator.ann_file={root}/annotations/instances_val2017.json',
        f'test_evaluator.ann_file={root}/annotations/instances_val2017.json',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={root}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    return options


def _draw(rng, size, objects):
    width, height = size
    noise = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    annotations = []
    for place in rng.permutation(4)[:objects]:  # one quarter of the image each
        kind = int(rng.integers(len(SHAPES)))
        extent = np.array(size) / 2 * rng.uniform(0.5, 0.9, 2)
        corner = np.array([place % 2, place // 2]) * size / 2 + rng.uniform(0, 1, 2) * (
            np.array(size) / 2 - extent
        )
        polygon = _polygon(SHAPES[kind], corner, extent)
        ImageDraw.Draw(picture).polygon([tuple(point) for point in polygon], fill=COLOURS[kind])
        flat = [round(float(v), 2) for v in polygon.reshape(-1)]
        runs = mask_api.merge(mask_api.frPyObjects([flat], height, width))
        box = [float(v) for v in mask_api.toBbox(runs)]
        area = float(mask_api.area(runs))
        runs['counts'] = runs['counts'].decode()
        annotations.append(
            dict(
                category_id=kind + 1,
                bbox=box,
                area=area,
                segmentation=runs if len(annotations) % 2 else [flat],
            )
        )
    return picture, annotations


def _polygon(shape, corner, extent):
    if shape == 'rectangle':
        unit = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    elif shape == 'triangle':
        unit = np.array([(0.5, 0), (1, 1), (0, 1)])
    else:
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        unit = np.stack((np.cos(angles), np.sin(angles)), 1) / 2 + 0.5
    return corner + unit * extent
