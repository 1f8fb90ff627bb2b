"""Match the images and label images of a folder by their names and contents."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from . import FolderError
from .files import flatness, images_below, split_of

_HINT = re.compile(r'mask|label|annot|gt|seg|truth|target', re.IGNORECASE)
_FLAT = 0.8  # smallest share of a label's pixels that equal their neighbours
_ENOUGH = 0.5  # smallest share of images with a label


@dataclass
class Pairs:
    """Images of a split and their labels, as mmseg names them.

    Attributes:
        images: Folder of the images, relative to the data set.
        labels: Folder of the labels.
        image_suffix: What follows a name in an image's file name, such as ``.jpg``.
        label_suffix: What follows it in a label's file name, such as ``_mask.png``.
        names: Names of the pairs, sorted, including any subfolders.
        unlabelled: Images without a label.
    """

    images: Path
    labels: Path
    image_suffix: str
    label_suffix: str
    names: list[str] = field(default_factory=list)
    unlabelled: int = 0

    def image_paths(self, root: Path) -> list[Path]:
        return [root / self.images / (name + self.image_suffix) for name in self.names]

    def label_paths(self, root: Path) -> list[Path]:
        return [root / self.labels / (name + self.label_suffix) for name in self.names]


@dataclass
class _Group:
    """Files of one folder whose names have the same ending."""

    folder: Path
    suffix: str
    stems: set[str]
    flat: float = 0.0


def find_pairs(root: Path) -> dict[str | None, Pairs]:
    """Return the images and labels of each split below a folder, by 'train', 'val' and 'test'.

    The key is None if no folder names a split.

    Raises:
        FolderError: If images and labels cannot be told apart or do not belong together.
    """
    groups = _groups(root)
    if not groups:
        raise FolderError(f'there are no images below {root}')
    for group in groups:
        group.flat = flatness(
            [root / group.folder / (stem + group.suffix) for stem in sorted(group.stems)]
        )
    matched = [pair for image in groups if (pair := _label_of(image, groups))]
    labels = {(pair.labels, pair.label_suffix) for pair in matched}
    matched = [pair for pair in matched if (pair.images, pair.image_suffix) not in labels]
    if not matched:
        there = '\n'.join(
            f'  {group.folder or "."}/*{group.suffix}: {len(group.stems)}' for group in groups
        )
        raise FolderError(
            'no images with label images of the same name were found: a label has the name of its '
            'image, in a folder of its own or with an ending such as _mask; and labels are saved '
            f'without loss, as PNG. Below {root} there are\n{there}'
        )
    splits: dict[str | None, list[Pairs]] = defaultdict(list)
    for pair in matched:
        splits[split_of(pair.images)].append(pair)
    return {split: _merged(pairs, split) for split, pairs in splits.items()}


def _groups(root: Path) -> list[_Group]:
    stems: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for path in images_below(root):
        stems[path.parent.relative_to(root), path.suffix].add(path.stem)
    groups = []
    for (folder, suffix), names in stems.items():
        tail = _tail_within(names)
        if tail:
            ends = {name for name in names if name.endswith(tail)}
            groups.append(_Group(folder, tail + suffix, {name[: -len(tail)] for name in ends}))
            names = names - ends
        groups.append(_Group(folder, suffix, names))
    return groups


def _tail_within(names: set[str]) -> str:
    """Return what label names append to those of images in the same folder; '' if nothing does."""
    tails = Counter(
        name[end:] for name in names for end in range(1, len(name)) if name[:end] in names
    )
    if not tails:
        return ''
    tail, count = tails.most_common(1)[0]
    return tail if count >= 0.4 * len(names) and not tail[-1:].isdigit() else ''


def _label_of(image: _Group, groups: list[_Group]) -> Pairs | None:
    """Pair a group of images with the labels that fit best; None if none do."""
    best: tuple[tuple, Pairs] | None = None
    for label in groups:
        if label is image or label.flat < _FLAT or label.flat <= image.flat:
            continue
        tails = Counter(
            stem[end:]
            for stem in label.stems
            for end in range(len(stem), 0, -1)
            if stem[:end] in image.stems
        )
        if not tails:
            continue
        tail, count = tails.most_common(1)[0]
        # one pair may be all of a folder, if the names are equal
        if count < max(1 if tail == '' else 2, _ENOUGH * min(len(image.stems), len(label.stems))):
            continue
        same_split = split_of(image.folder) == split_of(label.folder)
        same_name = image.folder.name == label.folder.name
        rank = same_split, same_name, bool(_HINT.search(str(label.folder / label.suffix))), count
        names = sorted(stem for stem in image.stems if stem + tail in label.stems)
        pair = Pairs(
            image.folder,
            label.folder,
            image.suffix,
            tail + label.suffix,
            names,
            len(image.stems) - len(names),
        )
        if best is None or rank > best[0]:
            best = rank, pair
    return best[1] if best else None


def _merged(pairs: list[Pairs], split: str | None) -> Pairs:
    """Merge the pairs of several folders into one, whose names include subfolders."""
    if len(pairs) == 1:
        return pairs[0]
    roots = set()
    names, unlabelled = [], 0
    for pair in pairs:
        images, labels = list(pair.images.parts), list(pair.labels.parts)
        below: list[str] = []
        while images and labels and images[-1] == labels[-1]:
            if split is not None and split_of(Path(images[-1])) == split:
                break
            below.insert(0, images.pop())
            labels.pop()
        roots.add((Path(*images), Path(*labels), pair.image_suffix, pair.label_suffix))
        names += ['/'.join((*below, name)) for name in pair.names]
        unlabelled += pair.unlabelled
    if len(roots) > 1:
        there = '\n'.join(f'  {a}/*{c} with {b}/*{d}' for a, b, c, d in sorted(roots, key=str))
        raise FolderError(
            'images and labels are in several places, which one data set cannot read: give the '
            f'folder of one of them, or put them together:\n{there}'
        )
    return Pairs(*roots.pop(), sorted(names), unlabelled)
