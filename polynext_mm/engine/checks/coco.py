"""An annotation file in COCO's format, checked against its images and a config's classes.

mmdet silently skips what it cannot use: empty boxes, unknown categories, classes whose name it does
not find, images that ``filter_cfg`` excludes. Here they are counted.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .findings import DataError, Finding, listed

# fraction of empty boxes that is tolerated: large sets have a few
_TOLERATED = 0.001
_PIXELS = 2.0  # how far boxes may reach beyond the image, from rounding
_SECTIONS = ('images', 'annotations', 'categories')
_POINTS = 6  # coordinates of a triangle, the smallest polygon


@dataclass
class CocoAudit:
    """What is in an annotation file.

    Attributes:
        path: The file.
        images: How many images it lists.
        kept: How many of them ``filter_cfg`` keeps.
        boxes: How many boxes it has.
        usable: Boxes of each class that training will use.
        with_class: Images with a usable box of each class.
        findings: What is wrong.
        image_ids: Ids of the images.
        files: Width and height of each image, by its name in the folder of images.
    """

    path: str
    images: int = 0
    kept: int = 0
    boxes: int = 0
    usable: dict[str, int] = field(default_factory=dict)
    with_class: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    image_ids: frozenset = frozenset()
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_coco(path: str | os.PathLike) -> dict:
    """Read an annotation file.

    Raises:
        DataError: If it is not complete JSON, or not in COCO's format.
    """
    name = f'{path} ({os.path.getsize(path)} bytes)'
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f'{name} is cut short or no JSON ({error}): get the file again') from error
    missing = [
        section
        for section in _SECTIONS
        if not isinstance(content, dict) or not isinstance(content.get(section), list)
    ]
    if missing:
        raise DataError(
            f'{name} is not in the format of COCO, it has no list of {" and of ".join(missing)}: '
            'give ann_file of the data set a file like instances_train2017.json'
        )
    return content


def audit_coco(
    path: str | os.PathLike,
    classes: Sequence[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    with_mask: bool = False,
    filter_cfg: Mapping | None = None,
) -> CocoAudit:
    """Look through an annotation file.

    Args:
        path: The file.
        classes: Names of the classes to train on; the file's by default.
        image_folder: Where the images should be; not looked for by default.
        with_mask: Whether masks are trained on.
        filter_cfg: The setting by which a training data set leaves out images.

    Raises:
        DataError: If the file cannot be read at all, or lacks what every entry needs.
    """
    content = read_coco(path)
    images, annotations, categories = (content[section] for section in _SECTIONS)
    _require(path, 'images', images, _IMAGE)
    _require(path, 'annotations', annotations, _ANNOTATION)
    _require(path, 'categories', categories, _CATEGORY)
    names = {category['id']: category['name'] for category in categories}
    classes = list(names.values()) if classes is None else list(classes)
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    audit = CocoAudit(str(path), len(images), boxes=len(annotations), image_ids=frozenset(sizes))
    audit.files = {image['file_name']: sizes[image['id']] for image in images}
    audit.findings += _ids(path, content)
    audit.findings += _names(path, classes, categories, annotations)
    audit.findings += _strangers(path, annotations, sizes, names)
    if image_folder is not None:
        audit.findings += _files(path, images, image_folder)
    known = [entry for entry in annotations if entry['image_id'] in sizes]
    boxes = np.array([entry['bbox'] for entry in known], float).reshape(-1, 4)
    audit.findings += _geometry(path, known, boxes, sizes)
    if with_mask:
        audit.findings += _masks(path, known, sizes)
    filter_cfg = filter_cfg or {}
    kept = _kept(filter_cfg, classes, names, known, sizes)
    audit.kept = len(kept)
    small = sum(min(size) < filter_cfg.get('min_size', 0) for size in sizes.values())
    if small:
        audit.findings.append(
            Finding(
                f'{path}: {small} of {len(sizes)} images have a side shorter than '
                f'filter_cfg.min_size={filter_cfg["min_size"]}, and are left out of training',
                'set filter_cfg.min_size=0 in the data set to train on them as well',
                serious=False,
            )
        )
    unused = _count(audit, classes, names, known, boxes, sizes, kept)
    if not images:
        audit.findings.append(Finding(f'{path} lists no images', 'check ann_file of the data set'))
    elif not sum(audit.usable.values()):
        audit.findings.append(
            Finding(
                f'{path}: of {len(annotations)} boxes none can be used for the {len(classes)} '
                f'classes ({listed(classes)}){_because(unused, classes)}',
                'check metainfo.classes of the data set and the boxes',
            )
        )
    else:
        absent = [name for name in classes if not audit.usable.get(name)]
        if absent and not any('is not among' in finding.what for finding in audit.findings):
            audit.findings.append(
                Finding(
                    f'{path}: no usable box of {listed(absent)}{_because(unused, absent)}',
                    'these classes cannot be learnt: add examples, or remove the classes',
                    serious=False,
                )
            )
    return audit


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_side(value: object) -> bool:
    return _is_number(value) and math.isfinite(value) and value > 0


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


_IMAGE = {
    'id': (_is_id, 'a number or a text'),
    'file_name': (_is_text, 'a text'),
    'width': (_is_side, 'a positive number of pixels'),
    'height': (_is_side, 'a positive number of pixels'),
}
_ANNOTATION = {
    'id': (_is_id, 'a number or a text'),
    'image_id': (_is_id, 'a number or a text'),
    'category_id': (_is_id, 'a number or a text'),
    'bbox': (_is_box, 'four numbers, x, y, width, height'),
    'area': (_is_number, 'a number'),
}
_CATEGORY = {'id': (_is_id, 'a number or a text'), 'name': (_is_text, 'a text')}


def _require(
    path, section: str, entries: list, keys: Mapping[str, tuple[Callable[[object], bool], str]]
) -> None:
    for index, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or entry.get(key) is None]
        if missing:
            raise DataError(
                f'{path}: {section}[{index}] has no {" and no ".join(missing)}: every entry of '
                f'{section} needs {", ".join(keys)}'
            )
        for key, (is_right, kind) in keys.items():
            if not is_right(entry[key]):
                raise DataError(
                    f'{path}: {section}[{index}] (id {entry["id"]}) has the {key} {entry[key]!r}: '
                    f'it must be {kind}'
                )
        if section == 'annotations' and entry.get('iscrowd') not in (None, 0, 1, '0', '1'):
            raise DataError(
                f'{path}: annotations[{index}] (id {entry["id"]}) has iscrowd='
                f'{entry["iscrowd"]!r}: it must be 0 or 1'
            )


def _is_crowd(entry: Mapping) -> bool:
    return bool(int(entry.get('iscrowd') or 0))


def _ids(path, content: Mapping[str, list]) -> Iterator[Finding]:
    for section, entries in content.items():
        if section not in _SECTIONS:
            continue
        twice = _repeated(entry['id'] for entry in entries)
        if twice:
            yield Finding(
                f'{path}: {len(twice)} ids of {section} occur more than once ({listed(twice)})',
                'give each entry an id of its own',
            )
    twice = _repeated(os.path.normpath(image['file_name']) for image in content['images'])
    if twice:
        yield Finding(
            f'{path}: {len(twice)} files are listed as several images ({listed(twice)}), and each '
            'is trained without the boxes of the others',
            'list each file once, and give all its annotations that image_id',
        )


def _repeated(values: Iterable) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def _names(
    path, classes: list, categories: Sequence[Mapping], annotations: list
) -> Iterator[Finding]:
    names = {category['id']: category['name'] for category in categories}
    in_file = list(names.values())
    loosely = {name.strip().casefold(): name for name in in_file}
    for name in classes:
        if name not in in_file:
            alike = loosely.get(str(name).strip().casefold())
            yield Finding(
                f'{path}: class {name!r} is not among its categories ({listed(in_file)})',
                f'write it as the file does, {alike!r}'
                if alike is not None
                else 'set metainfo=dict(classes=(...)) of all data sets to names of the file, and '
                'num_classes of the heads to their number; a class without boxes needs an entry in '
                'categories too',
            )
    boxes = Counter(entry['category_id'] for entry in annotations)
    for name in _repeated(category['name'] for category in categories):
        if name in classes:
            ids = [identity for identity, other in names.items() if other == name]
            counts = listed(f'id {identity} with {boxes[identity]} boxes' for identity in ids)
            unused = [identity for identity in ids if not boxes[identity]]
            yield Finding(
                f'{path}: more than one category has the name {name!r} ({counts}), and mmdet would '
                'number the classes wrongly',
                f'rename the category without boxes (id {unused[0]}), such as to "all {name}"'
                if unused and len(ids) > 1
                else 'give each category a name of its own',
            )
    unused = {identity: name for identity, name in names.items() if name not in classes}
    left_out = Counter(names[identity] for identity in boxes.elements() if identity in unused)
    if left_out:
        counts = listed(f'{name}: {count}' for name, count in left_out.most_common())
        yield Finding(
            f'{path}: boxes of categories that are not trained are left out ({counts})',
            'add the names to metainfo.classes if they should be trained',
            serious=False,
        )


def _strangers(path, annotations: list, sizes: dict, names: dict) -> Iterator[Finding]:
    for key, known, what, remedy in (
        ('image_id', sizes, 'an image', 'the annotations are of other images: check the file'),
        ('category_id', names, 'a category', 'add the categories, or correct the annotations'),
    ):
        strange = Counter(entry[key] for entry in annotations if entry[key] not in known)
        if strange:
            yield Finding(
                f'{path}: {sum(strange.values())} of {len(annotations)} annotations name {what} '
                f'that the file does not list ({listed(map(repr, strange))})',
                remedy,
            )


def _files(path, images: list, folder: str | os.PathLike) -> Iterator[Finding]:
    """Find listed images that do not exist, by listing folders instead of probing each file."""
    wanted = defaultdict(set)
    for image in images:
        whole = os.path.join(folder, image['file_name'])
        wanted[os.path.dirname(whole)].add(os.path.basename(whole))
    missing, there = [], 0
    for directory, files in sorted(wanted.items()):
        present = set(os.listdir(directory)) if os.path.isdir(directory) else set()
        there += len(present)
        missing += [os.path.join(directory, name) for name in sorted(files - present)]
    if missing:
        yield Finding(
            f'{path}: {len(missing)} of its {len(images)} images are not in {folder}, which has '
            f'{there} files (e.g. {missing[0]})',
            'the annotations may be of other images: check ann_file and data_prefix of the data '
            'set',
        )


def _geometry(path, annotations: list, boxes: np.ndarray, sizes: dict) -> Iterator[Finding]:
    if not len(boxes):
        return
    x, y, width, height = boxes.T
    extent = np.array([sizes[entry['image_id']] for entry in annotations], float)
    area = np.array([entry['area'] for entry in annotations], float)
    identities = np.array([entry['id'] for entry in annotations], object)
    if not np.isfinite(boxes).all():
        bad = identities[~np.isfinite(boxes).all(1)]
        yield Finding(
            f'{path}: {len(bad)} boxes have a number that is not finite (annotations '
            f'{listed(bad)})',
            'correct or remove them',
        )
        return
    if boxes.max() <= 1.5 and extent.min() > 16:
        yield Finding(
            f'{path}: no box reaches beyond 1.5 pixels, they look like fractions of the image',
            'multiply x and width by the width, y and height by the height of the image',
        )
        return
    outside = (
        (x < -_PIXELS)
        | (y < -_PIXELS)
        | (x + width > extent[:, 0] + _PIXELS)
        | (y + height > extent[:, 1] + _PIXELS)
    )
    if _are_corners(boxes, area, outside):
        yield Finding(
            f'{path}: the boxes look like x1, y1, x2, y2 ({outside.mean():.0%} would reach out of '
            'their images, e.g. annotation '
            f'{identities[outside][0] if outside.any() else identities[0]})',
            'COCO has x, y, width, height: subtract the first corner from the second',
        )
        return
    empty = (width <= 0) | (height <= 0)
    if empty.any():
        yield Finding(
            f'{path}: {empty.sum()} of {len(boxes)} boxes have no or negative width or height '
            f'(annotations {listed(identities[empty])}), and are left out of training',
            'correct or remove them',
            serious=empty.mean() > _TOLERATED,
        )
    if outside.any():
        yield Finding(
            f'{path}: {outside.sum()} of {len(boxes)} boxes reach out of their images '
            f'(annotations {listed(identities[outside])})',
            'check that width, height and boxes are of the same image size',
            serious=outside.mean() > 0.5,
        )


def _are_corners(boxes: np.ndarray, area: np.ndarray, outside: np.ndarray) -> bool:
    """Return whether boxes look like two corners: the second is nearly always beyond the first."""
    x, y, right, bottom = boxes.T
    if ((right > x) & (bottom > y)).mean() < 0.99:
        return False
    as_corners = np.isclose(area, (right - x) * (bottom - y), rtol=0.01)
    as_extent = np.isclose(area, right * bottom, rtol=0.01)
    if (as_corners & ~as_extent).mean() > 0.5:
        return True
    return outside.mean() > (0.05 if len(boxes) >= 20 else 0.3)


def _masks(path, annotations: list, sizes: Mapping) -> Iterator[Finding]:
    unmasked = [entry['id'] for entry in annotations if not entry.get('segmentation')]
    if unmasked:
        yield Finding(
            f'{path}: {len(unmasked)} annotations have no segmentation (ids {listed(unmasked)})',
            'train boxes alone (with_mask=False, a model without mask_head), or add the masks',
        )
    for is_wrong, what, remedy in (
        (
            _is_no_polygon,
            'have a segmentation that is neither a list of polygons [x1, y1, x2, y2, ...] of three '
            'points or more nor run lengths, and are left out of training',
            'correct them',
        ),
        (
            lambda entry: _is_of_another_size(entry, sizes[entry['image_id']]),
            'have run lengths of another size than their image',
            'check that width, height and masks are of the same image size',
        ),
    ):
        wrong = [entry['id'] for entry in annotations if is_wrong(entry)]
        if wrong:
            yield Finding(
                f'{path}: {len(wrong)} of {len(annotations)} annotations {what} '
                f'(ids {listed(wrong)})',
                remedy,
                serious=len(wrong) > _TOLERATED * len(annotations),
            )


def _is_no_polygon(entry: Mapping) -> bool:
    mask = entry.get('segmentation')
    if isinstance(mask, dict):
        return not isinstance(mask.get('counts'), (list, str)) or not mask.get('size')
    if not mask:
        return False
    return not isinstance(mask, list) or not all(
        isinstance(polygon, list)
        and len(polygon) >= _POINTS
        and len(polygon) % 2 == 0
        and all(map(_is_number, polygon))
        for polygon in mask
    )


def _is_of_another_size(entry: Mapping, size: tuple[int, int]) -> bool:
    mask = entry.get('segmentation')
    return isinstance(mask, dict) and list(mask.get('size') or ()) not in ([], [size[1], size[0]])


def _kept(
    filter_cfg: Mapping, classes: Collection, names: Mapping, annotations: list, sizes: Mapping
) -> set:
    """Return the ids of the images that mmdet trains on, by its rules."""
    shortest = filter_cfg.get('min_size', 0)
    kept = {identity for identity, size in sizes.items() if min(size) >= shortest}
    if filter_cfg.get('filter_empty_gt'):
        kept &= {
            entry['image_id'] for entry in annotations if names.get(entry['category_id']) in classes
        }
    return kept


def _count(audit: CocoAudit, classes, names, annotations, boxes, sizes, kept) -> dict[str, Counter]:
    """Count the boxes that mmdet keeps by its rules; return why it drops the others."""
    used, images, unused = Counter(), defaultdict(set), defaultdict(Counter)
    for entry, (x, y, width, height) in zip(annotations, boxes.tolist()):
        name = names.get(entry['category_id'])
        if name not in classes:
            continue
        across, down = sizes[entry['image_id']]
        inside = min(x + width, across) > max(x, 0) and min(y + height, down) > max(y, 0)
        for is_unused, reason in (
            (_is_crowd(entry), 'crowds (iscrowd=1)'),
            (entry.get('ignore'), 'marked ignore'),
            (not (width >= 1 and height >= 1), 'smaller than a pixel'),
            (not inside, 'outside their images'),
            (not entry['area'] > 0, 'of area 0'),
            (entry['image_id'] not in kept, 'on images that filter_cfg leaves out'),
        ):
            if is_unused:
                unused[name][reason] += 1
                break
        else:
            used[name] += 1
            images[name].add(entry['image_id'])
    audit.usable = {name: used[name] for name in classes}
    audit.with_class = {name: len(images[name]) for name in classes}
    return unused


def _because(unused: Mapping[str, Counter], classes: Collection[str]) -> str:
    reasons = sum((unused.get(name, Counter()) for name in classes), Counter())
    if not reasons:
        return ''
    return ': ' + listed(f'{count} are {reason}' for reason, count in reasons.most_common())
