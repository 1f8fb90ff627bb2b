"""Make the scenes of demo/materials: pieces of photographed materials that lie on others.

The photographs are in demo/materials/photographs. Every part of a scene is dyed in a colour of its
own, so that a pixel's colour says nothing about its material: its surroundings do. No pixel of a
photograph is in two splits. The same versions of Pillow and numpy give the same bytes. It takes ten
seconds, and the demos do it themselves:

    python demo/make_materials.py
    python demo/make_materials.py --out SOMEWHERE_ELSE
"""

from __future__ import annotations

import argparse
import colorsys
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SAMPLE = Path(__file__).with_name('materials')
SCENES = SAMPLE / 'scenes'
CLASSES = ('brick', 'grass', 'gravel', 'coins', 'galaxies', 'trees')  # in the order of their ids

# scenes, and the band of each photograph that they show: its start and end, in parts of the height
SPLITS = {
    'training': (480, 0.0, 0.5),
    'tuning': (50, 0.5, 0.7),
    'test': (100, 0.7, 1.0),
}

TILE = 128  # pixels
PIECES = (3, 5)
PIECE_SIZE = (40, 64)  # pixels across
SIDES = (3, 4, 6, 40)  # corners of a piece; 40 make a disc
MAX_ANGLE = 20  # degrees by which a material is turned
ZOOM = (0.85, 1.2)
CONTRAST = (0.7, 1.2)
SHADOW = 0.6  # how much of the light a piece takes
OVERSAMPLING = 4  # for smooth edges
MIN_VISIBLE = 0.8  # of a piece's pixels, whether the frame or another piece hides the rest
ATTEMPTS = 40  # at placing a piece
JPEG_QUALITY = 84


def load_photographs() -> list[np.ndarray]:
    """Read the photographs of all classes, (H, W) float32, of mean 0 and standard deviation 1."""
    photographs = []
    for name in CLASSES:
        with Image.open(SAMPLE / 'photographs' / f'{name}.png') as image:
            gray = np.asarray(image, np.float32)
        photographs.append((gray - gray.mean()) / gray.std())
    return photographs


def cut_band(gray: np.ndarray, start: float, end: float) -> np.ndarray:
    """Cut a band of rows out of a photograph, for one of the splits."""
    return gray[round(start * len(gray)) : round(end * len(gray))]


def lay_out(band: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cover a scene with a part of a material, dyed at random: (TILE, TILE, 3), 0 to 255.

    The part is turned, mirrored and zoomed at random. Where the band is smaller than the scene, it
    goes on mirrored.
    """
    rows, cols = band.shape
    reach = 2 * TILE
    band = np.pad(band, reach, mode='symmetric')
    angle = np.deg2rad(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    scale = 1 / rng.uniform(*ZOOM)
    mirrored = -1 if rng.random() < 0.5 else 1
    x, y = reach + rng.uniform(0, cols), reach + rng.uniform(0, rows)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    half = TILE / 2
    # from a pixel of the scene to one of the photograph
    matrix = (
        mirrored * cos,
        -mirrored * sin,
        x - mirrored * (cos - sin) * half,
        sin,
        cos,
        y - (sin + cos) * half,
    )
    image = Image.fromarray(band).transform(
        (TILE, TILE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    light = np.asarray(image)[..., None] * rng.uniform(*CONTRAST)
    hue, saturation = rng.random(), rng.uniform(0.2, 0.7)
    dye = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return 255 * dye * np.clip(0.55 + 0.2 * light, 0, 1)


def draw_piece(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw a polygon somewhere in a scene.

    Returns:
        Its opacity, (TILE, TILE) from 0 to 1, and its area in pixels, what lies outside included.
    """
    sides = int(rng.choice(SIDES))
    radius = rng.uniform(*PIECE_SIZE) / 2
    if sides == 3:
        radius *= 1.25  # a triangle of the same width is small
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(sides) / sides
    x, y = rng.uniform(0.1 * TILE, 0.9 * TILE, 2)
    corners = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1) * OVERSAMPLING
    image = Image.new('L', (TILE * OVERSAMPLING, TILE * OVERSAMPLING))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    area = radius**2 * sides / 2 * np.sin(2 * np.pi / sides)
    return np.asarray(image.reduce(OVERSAMPLING)) / 255, float(area)


def throw_shadow(opacity: np.ndarray) -> np.ndarray:
    """Return the light that is left, (TILE, TILE) from 0 to 1, beside a piece of this opacity."""
    moved = Image.fromarray(np.roll(opacity * 255, (2, 2), (0, 1)).astype(np.uint8))
    return 1 - SHADOW * np.asarray(moved.filter(ImageFilter.GaussianBlur(2.5))) / 255


def compose(
    bands: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int], int]]]:
    """Make a scene: a material all over, and pieces of others on it.

    Args:
        bands: The gray values of each class, by id.
        rng: The source of all that is random.

    Returns:
        The scene, (TILE, TILE, 3) uint8; the class ids of its pixels, (TILE, TILE) uint8; and the
        class id, the box (left, top, width, height) and the visible pixels of each piece.
    """
    ground = int(rng.integers(len(bands)))
    scene = lay_out(bands[ground], rng)
    owner = np.zeros((TILE, TILE), int)  # the number of the piece that a pixel shows, from 1
    class_ids, areas = [ground], [0.0]
    for _ in range(rng.integers(*PIECES, endpoint=True)):
        for _ in range(ATTEMPTS):
            opacity, area = draw_piece(rng)
            together = np.where(opacity >= 0.5, len(areas), owner)
            visible = np.bincount(together.ravel(), minlength=len(areas) + 1)
            if np.all(visible >= MIN_VISIBLE * np.array([*areas, area])):
                break
        else:
            continue
        owner = together
        areas.append(area)
        # an edge between two parts of the same material would be none
        class_ids.append((ground + int(rng.integers(1, len(bands)))) % len(bands))
        piece = lay_out(bands[class_ids[-1]], rng)
        scene *= throw_shadow(opacity)[..., None]
        scene += opacity[..., None] * (piece - scene)
    boxes = []
    for number, class_id in enumerate(class_ids[1:], start=1):
        rows, cols = np.nonzero(owner == number)
        left, top = int(cols.min()), int(rows.min())
        box = [left, top, int(cols.max()) + 1 - left, int(rows.max()) + 1 - top]
        boxes.append((class_id, box, len(rows)))
    return np.rint(scene).astype(np.uint8), np.array(class_ids, np.uint8)[owner], boxes


def make_split(folder: Path, name: str, scenes: int | None = None) -> np.ndarray:
    """Write the scenes of a split, with label images and boxes in COCO's format.

    Args:
        folder: Gets images/NAME, annotations/NAME and annotations/instances_NAME.json.
        name: The split, of SPLITS.
        scenes: How many to make, if not all.

    Returns:
        The pixels of each class.
    """
    for kind in ('images', 'annotations'):
        (folder / kind / name).mkdir(parents=True)
    all_scenes, start, end = SPLITS[name]
    bands = [cut_band(photograph, start, end) for photograph in load_photographs()]
    rng = np.random.default_rng(list(SPLITS).index(name))
    pixels = np.zeros(len(CLASSES), dtype=np.int64)
    images, annotations = [], []
    for number in range(scenes or all_scenes):
        scene, ids, boxes = compose(bands, rng)
        stem = f'{number:03d}'
        Image.fromarray(scene).save(
            folder / 'images' / name / f'{stem}.jpg', quality=JPEG_QUALITY, optimize=True
        )
        Image.fromarray(ids).save(folder / 'annotations' / name / f'{stem}.png', optimize=True)
        pixels += np.bincount(ids.ravel(), minlength=len(pixels))
        # Ids start at 1: COCO's evaluation takes a match with box 0 for no match.
        image_id = number + 1
        images.append({'id': image_id, 'file_name': f'{stem}.jpg', 'width': TILE, 'height': TILE})
        for class_id, box, area in boxes:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': class_id + 1,
                    'bbox': box,
                    'area': area,
                    'iscrowd': 0,
                }
            )
    categories = [{'id': place, 'name': title} for place, title in enumerate(CLASSES, start=1)]
    coco = {'images': images, 'annotations': annotations, 'categories': categories}
    path = folder / 'annotations' / f'instances_{name}.json'
    path.write_text(json.dumps(coco, separators=(',', ':')) + '\n')
    return pixels


def make_scenes(folder: Path = SCENES) -> Path:
    """Make all scenes, unless the folder is there already, and return it.

    They get their name when they are complete, so several processes may ask for them at once.
    """
    if folder.is_dir():
        return folder
    print(f'Making the scenes of the sample in {folder} (ten seconds)', flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{folder.name}.', dir=folder.parent) as scratch:
        made = Path(scratch, 'made')
        for name, (scenes, _, _) in SPLITS.items():
            pixels = make_split(made, name)
            shares = ', '.join(
                f'{title} {count / pixels.sum():.1%}' for title, count in zip(CLASSES, pixels)
            )
            print(f'{name}: {scenes} scenes; {shares}')
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        default=SCENES,
        help='folder to make (default: demo/materials/scenes)',
    )
    print(f'The scenes are in {make_scenes(parser.parse_args().out)}')


if __name__ == '__main__':
    main()
