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
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from . import FolderError
from .files import SUFFIXES, image_size, images_below, split_of, walk
from .masks import class_names

FORMATS = ('coco', 'voc', 'yolo', 'labelme')
_IMAGE_FOLDERS = ('images', 'jpegimages')
# what readers raise for a JSON file that is not built as its format says
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class Box(NamedTuple):
    """An object: its class, x, y, width and height in pixels, and the outlines of its parts."""

    name: str
    box: tuple[float, float, float, float]
    polygons: Sequence[list[float]] = ()
    ignored: bool = False


class Picture(NamedTuple):
    """An image, its width and height, and what is in it."""

    path: Path
    size: tuple[int, int]
    boxes: list[Box]


def find_format(root: Path) -> tuple[str, list[Path]]:
    """Return which format the annotations below a folder have, and their files.

    Raises:
        FolderError: If there are none, or of several formats; and for a broken .json file, unless
            the annotations are those of VOC or YOLO.
    """
    found: dict[str, list[Path]] = {name: [] for name in FORMATS}
    stems = {path.stem for path in images_below(root)}
    broken = None
    for path in walk(root):
        if path.suffix == '.xml' and '<annotation' in _head(path):
            found['voc'].append(path)
        elif path.suffix == '.json':
            try:
                content = _json(path)
            except FolderError as error:
                broken = broken or error
                continue
            if isinstance(content, dict) and {'images', 'annotations'} <= content.keys():
                found['coco'].append(path)
            elif isinstance(content, dict) and 'shapes' in content:
                found['labelme'].append(path)
        elif path.suffix == '.txt' and path.stem in stems:
            found['yolo'].append(path)
    # of COCO itself: those beside them hold captions, or the same objects with keypoints
    instances = [path for path in found['coco'] if path.name.startswith('instances_')]
    found['coco'] = instances or found['coco']
    if broken and not (found['voc'] or found['yolo']):
        raise broken
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise FolderError(f'{path} is not in UTF-8 ({error}): save it as such') from error


def read(
    root: Path, kind: str, files: Sequence[Path], classes: Sequence[str] | None = None
) -> tuple[list[Picture], list[str]]:
    """Read annotations.

    Args:
        root: Folder of the data set.
        kind: A name in ``FORMATS``.
        files: Annotation files.
        classes: Names of YOLO's classes, by default those that a file lists.

    Returns:
        tuple: The images, sorted, including those without annotations; and the classes, in the
        order of the file that lists them, if there is one, else sorted.

    Raises:
        FolderError: For a file that cannot be read, and for annotations whose image is missing.
    """
    images = _Images(root)
    readers = dict(coco=_read_coco, voc=_read_voc, labelme=_read_labelme)
    places = [root, *sorted({path.parent for path in files})]  # LabelImg writes them beside labels
    listed = next(filter(None, map(class_names, places)), None)
    names = listed[1] if listed else None
    if kind == 'yolo':
        in_yaml = _yolo_names(root)
        names = classes or names or in_yaml
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
        """Return the image of that name, of several the one whose folders fit best.

        Raises:
            FolderError: If there is none, if it is not below the root, or if several fit.
        """
        plain = Path(name.replace('\\', '/'))
        outside = None
        for place in (self.root / plain, annotation.parent / plain):
            if place.suffix.lower() in SUFFIXES and place.is_file():
                below = self._below(place)
                if below:
                    return below
                outside = place
        found = self._by_name.get(plain.name) or self._by_name.get(annotation.stem) or []
        if found:
            return self._best(found, plain, annotation)
        if outside:
            raise FolderError(
                f'{annotation}: the image {outside} is not below {self.root}: move it there, or '
                'give a folder that holds both'
            )
        raise FolderError(f'{annotation}: there is no image {plain.name or annotation.stem}')

    def _below(self, place: Path) -> Path | None:
        """Return a path as one below the root, without '..', or None if it is elsewhere."""
        for absolute in (os.path.abspath, os.path.realpath):
            relative = Path(os.path.relpath(absolute(place), absolute(self.root)))
            if '..' not in relative.parts and (self.root / relative).is_file():
                return self.root / relative
        return None

    def _best(self, found: Sequence[Path], name: Path, annotation: Path) -> Path:
        """Return the image whose folders fit an image's name and its annotation file best."""
        if len(found) == 1:
            return found[0]
        split = split_of(annotation.relative_to(self.root))
        parts = set(annotation.parts)

        def rank(path: Path) -> tuple:
            folders = path.relative_to(self.root).parent
            lower = folders.as_posix().lower().split('/')
            return (
                _common_end(name.parent, folders),
                split is not None and split_of(folders) == split,
                # labels/val/1.txt belongs to images/val/1.jpg, not to images/train/1.jpg
                len(parts & set(path.parts)),
                path.parent == annotation.parent,
                any(part in _IMAGE_FOLDERS for part in lower),
                lower[-1] in _IMAGE_FOLDERS,
            )

        best = max(map(rank, found))
        first, *others = (path for path in found if rank(path) == best)
        if others:
            shown = name.name or annotation.stem
            hint = ' give image names their folders in the annotations (file_name), or'
            raise FolderError(
                f'{annotation}: the image {shown} may be {first} or {others[0]}:'
                f'{hint if name.name else ""} take one of them away'
            )
        return first


def _common_end(first: Path, second: Path) -> int:
    """Return how many last parts of two paths are equal."""
    equal = (a == b for a, b in zip(reversed(first.parts), reversed(second.parts)))
    return sum(1 for _ in takewhile(bool, equal))


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
    """Return the names in a data.yaml, in either of its two forms.

    Raises:
        FolderError: If it cannot be read, or says that there are keypoints.
    """
    import yaml

    found = None
    for path in sorted(root.glob('*.y*ml')):
        try:
            content = yaml.safe_load(_text(path)) or {}
        except yaml.YAMLError as error:
            raise FolderError(f'{path} is no YAML file: {" ".join(str(error).split())}') from error
        if not isinstance(content, dict):
            raise FolderError(f"{path} has no keys: write the classes as 'names: [...]'")
        if 'kpt_shape' in content:
            raise FolderError(
                f'{path} has a kpt_shape, and keypoints are not read: write a class and its box in '
                'each line, and take kpt_shape away'
            )
        found = found or _listed_names(content.get('names'), path)
    return found


def _listed_names(names: Any, path: Path) -> list[str] | None:
    if isinstance(names, dict):
        try:
            by_id = {int(key): str(name) for key, name in names.items()}
        except (TypeError, ValueError) as error:
            raise FolderError(f'{path}: the keys of names must be numbers ({error})') from error
        return [by_id.get(i, f'class_{i:03d}') for i in range(max(by_id, default=-1) + 1)]
    return [str(name) for name in names] if isinstance(names, list) else None


def _read_yolo(
    images: _Images, files: Iterable[Path], names: Sequence[str] | None
) -> Iterator[Picture]:
    for file in files:
        path = images.find('', file)
        size = image_size(path)
        boxes = []
        for number, line in enumerate(_text(file).splitlines(), 1):
            if line.strip():
                boxes.append(_yolo_box(line, f'{file}, line {number}', size, names))
        yield Picture(path, size, boxes)


def _yolo_box(line: str, where: str, size: tuple[int, int], names: Sequence[str] | None) -> Box:
    width, height = size
    try:
        label, *corners = (float(value) for value in line.split())
        if not all(map(math.isfinite, corners)) or label < 0 or label != int(label):
            raise ValueError(line)
        name = names[int(label)] if names else f'class_{int(label):03d}'
    except (ValueError, IndexError, OverflowError) as error:
        known = f', or not one of the {len(names)} classes' if names else ''
        raise FolderError(
            f"{where}: not a class and its box in YOLO's format{known} ({line[:60]!r})"
        ) from error
    if len(corners) >= 6 and len(corners) % 2 == 0:  # outlines
        polygon = [v * (height if i % 2 else width) for i, v in enumerate(corners)]
        return Box(name, _around(polygon), [polygon])
    if len(corners) in (4, 5):  # the fifth is a score
        x, y, w, h = corners[:4]
        return Box(name, ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    raise FolderError(f'{where}: {len(corners)} numbers are no box')


def _read_labelme(images: _Images, files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        content = _json(file)
        try:
            path = images.find(content.get('imagePath') or '', file)
            boxes = [_labelme_box(shape, file) for shape in content['shapes']]
        except FolderError:
            raise
        except _MALFORMED as error:
            raise FolderError(f"{file} is not in LabelMe's format: {error!r}") from error
        yield Picture(path, image_size(path), [box for box in boxes if box])


def _labelme_box(shape: dict, file: Path) -> Box | None:
    """Return a polygon or rectangle, or None for points and lines, which enclose nothing."""
    points = shape.get('points') or []
    kind = shape.get('shape_type') or 'polygon'
    if kind in ('point', 'points', 'line', 'linestrip'):
        return None
    if kind == 'rectangle' and len(points) == 2:
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind not in ('polygon', 'rectangle') or len(points) < 3:
        raise FolderError(
            f'{file}: a {kind} of {len(points)} points is no outline: use polygons and rectangles'
        )
    polygon = [float(value) for point in points for value in point]
    return Box(str(shape['label']), _around(polygon), [polygon])


def _read_coco(images: _Images, files: Iterable[Path]) -> Iterator[Picture]:
    for file in files:
        try:
            yield from _coco_pictures(images, file, _json(file))
        except FolderError:
            raise
        except _MALFORMED as error:
            raise FolderError(f"{file} is not in COCO's format: {error!r}") from error


def _coco_pictures(images: _Images, file: Path, content: dict) -> Iterator[Picture]:
    names = {_id(entry['id']): str(entry['name']) for entry in content.get('categories') or ()}
    boxes: dict[str, list[Box]] = {}
    for entry in content['annotations']:
        boxes.setdefault(_id(entry['image_id']), []).append(_coco_box(entry, names, file))
    if boxes and boxes.keys().isdisjoint(_id(entry['id']) for entry in content['images']):
        raise FolderError(
            f'{file}: no image has the image_id of an annotation, such as {next(iter(boxes))}: '
            'give both the same ids'
        )
    for entry in content['images']:
        path = images.find(entry['file_name'], file)
        size = int(entry.get('width') or 0), int(entry.get('height') or 0)
        yield Picture(
            path, size if min(size) > 0 else image_size(path), boxes.get(_id(entry['id']), [])
        )


def _id(value: Any) -> str:
    """Return an id as text, since files mix 1, 1.0 and '1'."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _coco_box(entry: dict, names: dict[str, str], file: Path) -> Box:
    where = f'{file}: annotation {entry.get("id")}'
    if 'category_id' not in entry:
        raise FolderError(
            f'{where} has no category_id: add it, or take the file away if it holds captions'
        )
    name = names.get(_id(entry['category_id']))
    if name is None:
        raise FolderError(
            f'{where} has the category_id {entry["category_id"]!r}, which is none of the '
            f'{len(names)} categories: add it to them'
        )
    outlines = entry.get('segmentation')
    outlines = outlines if isinstance(outlines, list) else []
    polygons = [part for part in outlines if isinstance(part, list) and len(part) >= 6]
    box = entry.get('bbox') or (_around(sum(polygons, [])) if polygons else ())
    if len(box) != 4:
        raise FolderError(f'{where} has no bbox of four numbers: add it, or take it away')
    x, y, w, h = map(float, box)
    return Box(name, (x, y, w, h), polygons, bool(entry.get('iscrowd')))


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

    Raises:
        FolderError: For a box whose class is not in ``names``.
    """
    images, annotations = [], []
    numbers = {name: number for number, name in enumerate(names, 1)}
    for number, picture in enumerate(pictures, 1):
        width, height = picture.size
        name = picture.path.relative_to(folder).as_posix()
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for one in picture.boxes:
            if one.name not in numbers:
                raise FolderError(
                    f'{picture.path} has a box of {one.name!r}, which is none of the classes: name '
                    'all of them'
                )
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
                    **(dict(segmentation=list(one.polygons)) if one.polygons else {}),
                )
            )
    categories = [dict(id=number, name=name) for name, number in numbers.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def count(pictures: Iterable[Picture]) -> Counter[str]:
    """Return how many boxes there are of each class."""
    return Counter(box.name for picture in pictures for box in picture.boxes)


def draw_ids(picture: Picture, ids: dict[str, int]) -> Any:
    """Return the polygons of an image as a label image, later ones over earlier ones.

    Raises:
        FolderError: For an object that has none.
    """
    from PIL import Image, ImageDraw

    label = Image.new('L', picture.size, 0)
    pen = ImageDraw.Draw(label)
    for one in picture.boxes:
        if not one.polygons:
            raise FolderError(
                f'{picture.path} has a {one.name} without a polygon: boxes alone and masks as RLE '
                'are not supported here, write polygons'
            )
        for polygon in one.polygons:
            pen.polygon(polygon, fill=ids[one.name])
    return label
