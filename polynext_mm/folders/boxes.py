"""Boxes and polygons of VOC, YOLO, LabelMe and COCO as one dictionary in COCO's format.

The readers are our own and need only the standard library and Pillow. supervision, the maintained
library that reads most of these, would require PyAV and Python 3.10, expects a data.yaml beside
YOLO's files, does not read LabelMe, and drops what VOC marks as difficult, which must neither be
learnt nor count as an error; fiftyone requires a database, and labelme a window system.

CVAT exports "COCO 1.0", "Pascal VOC 1.1", "YOLO 1.1" and "LabelMe 3.0", of which the first three
are read here (its LabelMe is an older XML). Label Studio exports "COCO", "Pascal VOC XML" and
"YOLO".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from . import FolderError
from .files import SUFFIXES, image_size, images_below, walk
from .masks import class_names

FORMATS = ('coco', 'voc', 'yolo', 'labelme')


class Box(NamedTuple):
    """An object: its class, x, y, width and height in pixels, and its outline, if any."""

    name: str
    box: tuple[float, float, float, float]
    polygon: list[float] | None = None
    ignored: bool = False


class Picture(NamedTuple):
    """An image, its width and height, and what is in it."""

    path: Path
    size: tuple[int, int]
    boxes: list[Box]


def find_format(root: Path) -> tuple[str, list[Path]]:
    """Return which format the annotations below a folder have, and their files.

    Raises:
        FolderError: If there are none, or of several formats.
    """
    found: dict[str, list[Path]] = {name: [] for name in FORMATS}
    stems = {path.stem for path in images_below(root)}
    for path in walk(root):
        if path.suffix == '.xml' and '<annotation' in _head(path):
            found['voc'].append(path)
        elif path.suffix == '.json':
            content = _json(path)
            if isinstance(content, dict) and {'images', 'annotations'} <= content.keys():
                found['coco'].append(path)
            elif isinstance(content, dict) and 'shapes' in content:
                found['labelme'].append(path)
        elif path.suffix == '.txt' and path.stem in stems:
            found['yolo'].append(path)
    there = [name for name in FORMATS if found[name]]
    if len(there) != 1:
        what = ' and '.join(f'{len(found[name])} of {name}' for name in there) or 'none'
        raise FolderError(
            f'one format of annotations is needed below {root}, found {what}: COCO or LabelMe '
            '(.json), VOC (.xml), or YOLO (.txt, each with the name of its image)'
        )
    return there[0], found[there[0]]


def _head(path: Path) -> str:
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read(2000)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f'{path} is no JSON file: {error}') from error


def read(root: Path, kind: str, files: Sequence[Path]) -> tuple[list[Picture], list[str]]:
    """Read annotations.

    Args:
        root: Folder of the data set.
        kind: A name in ``FORMATS``.
        files: Annotation files.

    Returns:
        tuple: The images, sorted, including those without annotations; and the classes, in the
        order of the file that lists them, if there is one, else sorted.

    Raises:
        FolderError: For a file that cannot be read, and for annotations whose image is missing.
    """
    images = _Images(root)
    readers = dict(coco=_read_coco, voc=_read_voc, labelme=_read_labelme)
    listed = class_names(root)
    names = listed[1] if listed else None
    if kind == 'yolo':
        names = names or _yolo_names(root)
        pictures = _read_yolo(images, files, names)
    else:
        pictures = readers[kind](images, files)
    merged: dict[Path, Picture] = {}
    for picture in pictures:
        other = merged.get(picture.path)
        boxes = picture.boxes + (other.boxes if other else [])
        merged[picture.path] = picture._replace(boxes=boxes)
    occurring = {box.name for picture in merged.values() for box in picture.boxes}
    if names is None or not occurring <= set(names):
        names = sorted(occurring)
    if kind != 'coco':  # COCO's lists may leave out images on purpose
        for path in images.all:
            if path not in merged:
                merged[path] = Picture(path, image_size(path), [])
    return [merged[path] for path in sorted(merged)], names


class _Images:
    """Images below a folder, by the names that annotations use."""

    def __init__(self, root: Path):
        self.root = root
        self.all = images_below(root)
        self._by_name: dict[str, list[Path]] = {}
        for path in self.all:
            for key in {path.name, path.stem}:
                self._by_name.setdefault(key, []).append(path)

    def find(self, name: str, annotation: Path) -> Path:
        """Return the image of that name that shares most folders with its annotation file.

        Raises:
            FolderError: If there is none.
        """
        plain = name.replace('\\', '/')
        for place in (self.root / plain, annotation.parent / plain):
            if plain and place.suffix.lower() in SUFFIXES and place.is_file():
                return place.resolve() if '..' in place.parts else place
        name = Path(plain).name
        found = self._by_name.get(name) or self._by_name.get(annotation.stem) or []
        if not found:
            raise FolderError(f'{annotation}: there is no image {name or annotation.stem}')
        # labels/val/1.txt belongs to images/val/1.jpg, not to images/train/1.jpg
        parts = set(annotation.parts)
        return max(found, key=lambda path: len(parts & set(path.parts)))


def _read_voc(images: _Images, files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise FolderError(f'{file} is no XML file: {error}') from error
        path = images.find(tree.findtext('filename') or '', file)
        boxes = []
        for entry in tree.iter('object'):
            corners = entry.find('bndbox')
            if corners is None:
                continue
            try:
                left, top, right, bottom = (
                    float(corners.findtext(key) or '') for key in ('xmin', 'ymin', 'xmax', 'ymax')
                )
            except ValueError as error:
                raise FolderError(f'{file}: a bndbox has no numbers ({error})') from error
            # VOC counts pixels from 1 and includes the last one in the box
            box = left - 1, top - 1, right - left + 1, bottom - top + 1
            name = (entry.findtext('name') or '').strip()
            boxes.append(Box(name, box, ignored=entry.findtext('difficult') == '1'))
        yield Picture(path, image_size(path), boxes)


def _yolo_names(root: Path) -> list[str] | None:
    """Return the names in a data.yaml, in either of its two forms."""
    import yaml

    for path in sorted(root.glob('*.y*ml')):
        names = (yaml.safe_load(path.read_text(encoding='utf-8')) or {}).get('names')
        if isinstance(names, dict):
            return [str(names[key]) for key in sorted(names)]
        if isinstance(names, list):
            return [str(name) for name in names]
    return None


def _read_yolo(
    images: _Images, files: Iterable[Path], names: Sequence[str] | None
) -> Iterator[Picture]:
    for file in files:
        path = images.find('', file)
        width, height = image_size(path)
        boxes = []
        for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), 1):
            try:
                values = [float(value) for value in line.split()]
                label, corners = int(values[0]), values[1:]
                name = names[label] if names else f'class_{label:03d}'
            except (ValueError, IndexError) as error:
                raise FolderError(
                    f"{file}, line {number}: not a class and its box in YOLO's format, or not one "
                    f'of the {len(names or ())} classes ({line[:60]!r})'
                ) from error
            if len(corners) >= 6 and len(corners) % 2 == 0:  # outlines
                polygon = [v * (height if i % 2 else width) for i, v in enumerate(corners)]
                boxes.append(Box(name, _around(polygon), polygon))
            elif len(corners) in (4, 5):  # the fifth is a score
                x, y, w, h = corners[:4]
                box = (x - w / 2) * width, (y - h / 2) * height, w * width, h * height
                boxes.append(Box(name, box))
            elif line.strip():
                raise FolderError(f'{file}, line {number}: {len(corners)} numbers are no box')
        yield Picture(path, (width, height), boxes)


def _read_labelme(images: _Images, files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        content = _json(file)
        path = images.find(content.get('imagePath') or '', file)
        boxes = []
        for shape in content['shapes']:
            points = shape.get('points') or []
            kind = shape.get('shape_type') or 'polygon'
            if kind == 'rectangle' and len(points) == 2:
                (left, top), (right, bottom) = points
                points = [(left, top), (right, top), (right, bottom), (left, bottom)]
            elif kind != 'polygon' or len(points) < 3:
                raise FolderError(
                    f'{file}: a {kind} of {len(points)} points is no outline: use polygons and '
                    'rectangles'
                )
            polygon = [float(value) for point in points for value in point]
            boxes.append(Box(str(shape['label']), _around(polygon), polygon))
        yield Picture(path, image_size(path), boxes)


def _read_coco(images: _Images, files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        content = _json(file)
        names = {entry['id']: entry['name'] for entry in content.get('categories', ())}
        boxes: dict[Any, list[Box]] = {}
        for entry in content['annotations']:
            outline = entry.get('segmentation')
            polygon = outline[0] if isinstance(outline, list) and len(outline) == 1 else None
            boxes.setdefault(entry['image_id'], []).append(
                Box(
                    names[entry['category_id']],
                    tuple(entry['bbox']),
                    polygon,
                    bool(entry.get('iscrowd')),
                )
            )
        for entry in content['images']:
            size = entry['width'], entry['height']
            path = images.find(entry['file_name'], file)
            yield Picture(path, size, boxes.get(entry['id'], []))


def _around(polygon: Sequence[float]) -> tuple[float, float, float, float]:
    xs, ys = polygon[::2], polygon[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def to_coco(pictures: Iterable[Picture], names: Sequence[str], folder: Path) -> dict[str, list]:
    """Return COCO's dictionary.

    Boxes are clipped to their image; those that are then empty are left out.

    Args:
        pictures: Images of a split.
        names: Names of the classes.
        folder: The folder that names of image files are relative to.
    """
    images, annotations = [], []
    numbers = {name: number for number, name in enumerate(names, 1)}
    for number, picture in enumerate(pictures, 1):
        width, height = picture.size
        name = picture.path.relative_to(folder).as_posix()
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for one in picture.boxes:
            x, y, w, h = one.box
            left, top = min(max(x, 0.0), width), min(max(y, 0.0), height)
            right, bottom = min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)
            if right <= left or bottom <= top:
                continue
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=numbers[one.name],
                    bbox=[left, top, right - left, bottom - top],
                    area=(right - left) * (bottom - top),
                    iscrowd=int(one.ignored),
                    **(dict(segmentation=[one.polygon]) if one.polygon else {}),
                )
            )
    categories = [dict(id=number, name=name) for name, number in numbers.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def count(pictures: Iterable[Picture]) -> Counter[str]:
    """Return how many boxes there are of each class."""
    return Counter(box.name for picture in pictures for box in picture.boxes)


def draw_ids(picture: Picture, ids: dict[str, int]) -> Any:
    """Return the polygons of an image as a label image, later ones over earlier ones."""
    from PIL import Image, ImageDraw

    label = Image.new('L', picture.size, 0)
    pen = ImageDraw.Draw(label)
    for one in picture.boxes:
        if one.polygon is None:
            raise FolderError(f'{picture.path} has a box of {one.name} without an outline')
        pen.polygon(one.polygon, fill=ids[one.name])
    return label
