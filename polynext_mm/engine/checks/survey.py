"""Everything read once, in parallel: what `tools/check_dataset.py` makes its table of."""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from .findings import IGNORED, Finding, described, file_fault, id_remedy, listed, opencv_fault

_CHUNK = 32
_SHOWN = 3


class Facts(NamedTuple):
    """What was read of a sample.

    Attributes:
        size: Width and height of the image.
        mode: Of the image, as Pillow names it.
        digest: Of the bytes of the image file.
        label_size: Width and height of the label.
        label_mode: Of the label.
        ids: Pixels of each id in the label file.
        fault: Why one of the files could not be read.
    """

    size: tuple[int, int] | None = None
    mode: str = ''
    digest: bytes = b''
    label_size: tuple[int, int] | None = None
    label_mode: str = ''
    ids: dict[int, int] | None = None
    fault: Finding | None = None


@dataclass
class Survey:
    """What a split of a data set holds.

    Attributes:
        samples: How many were read.
        sizes: Of the images, with how often each occurs.
        modes: Of the images.
        label_modes: Of the labels.
        pixels: Of each id, as the files have it.
        images_with: Images that have each id.
        digests: Of the contents of image files, with the path of the first that has it.
        repeated: Images of the same content.
        faults: Files that cannot be read.
        broken: Images that cannot be read, or whose labels cannot.
        misfits: Images of another size than their label or their annotations.
        coloured: Labels with more than one channel.
        only: Labels with one or two ids, and these.
        examples: Of each id, a file that has it.
    """

    samples: int = 0
    sizes: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    label_modes: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)
    images_with: Counter = field(default_factory=Counter)
    digests: dict[bytes, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    misfits: list[str] = field(default_factory=list)
    coloured: list[str] = field(default_factory=list)
    only: list[tuple[str, frozenset[int]]] = field(default_factory=list)
    examples: dict[int, str] = field(default_factory=dict)

    def add(
        self,
        image: str,
        label: str | None,
        facts: Facts,
        listed_size: tuple[int, int] | None = None,
    ) -> None:
        """Count a sample.

        Args:
            image: Its file.
            label: Its label file, if there are labels.
            facts: What was read of them.
            listed_size: Width and height that the annotations give the image.
        """
        self.samples += 1
        if facts.digest:
            first = self.digests.setdefault(facts.digest, image)
            if first != image:
                self.repeated.append((first, image))
        if facts.fault:
            self.faults.append(facts.fault)
            self.broken.add(image)
            return
        self.sizes[facts.size] += 1
        self.modes[facts.mode] += 1
        # a camera held upright writes the turn beside the pixels, and annotators see them turned
        if listed_size and sorted(listed_size) != sorted(facts.size):
            self.misfits.append(f'{image} ({_times(facts.size)}, listed as {_times(listed_size)})')
        if facts.label_mode:
            self.label_modes[facts.label_mode] += 1
        if facts.ids is None:
            if label is not None:
                self.coloured.append(label)
            return
        if facts.label_size != facts.size:
            self.misfits.append(
                f'{label} ({_times(facts.label_size)}, its image {_times(facts.size)})'
            )
        self.pixels.update(facts.ids)
        self.images_with.update(facts.ids.keys())
        if len(facts.ids) <= 2:
            self.only.append((label, frozenset(facts.ids)))
        for identity in facts.ids:
            self.examples.setdefault(identity, label)


def _times(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'


def examine(pair: tuple[str, str | None], opencv: bool = True) -> Facts:
    """Read an image and, if there is one, its label.

    Args:
        pair: Their paths.
        opencv: Whether the image must be one that OpenCV can decode.
    """
    image, label = pair
    try:
        with open(image, 'rb') as file:
            content = file.read()
        with Image.open(image) as header:
            size, mode = header.size, header.mode
    except (OSError, ValueError, SyntaxError):
        return Facts(fault=_fault(image))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    # an eighth of the resolution is a quarter of the time, and needs all of the file as well
    reduced = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
    if reduced is None:
        fault = file_fault(image) or (opencv_fault(image) if opencv else None)
        if fault:
            return Facts(digest=digest, fault=fault)
    if label is None:
        return Facts(size, mode, digest)
    try:
        with Image.open(label) as picture:
            label_size, label_mode = picture.size, picture.mode
            ids = np.asarray(picture)
    except (OSError, ValueError, SyntaxError):
        return Facts(size, mode, digest, fault=_fault(label))
    counted = _histogram(ids) if ids.ndim == 2 else None
    return Facts(size, mode, digest, label_size, label_mode, counted)


def _fault(path: str) -> Finding:
    return file_fault(path) or Finding(f'{described(path)} cannot be read', 'get the file again')


def _histogram(ids: np.ndarray) -> dict[int, int]:
    if ids.dtype == np.uint8:
        # cv2 counts ten times as fast as numpy
        counts = cv2.calcHist([np.ascontiguousarray(ids)], [0], None, [256], [0, 256]).ravel()
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(ids.astype(np.int64), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


def _examine_chunk(pairs: Sequence[tuple[str, str | None]], opencv: bool) -> list[Facts]:
    cv2.setNumThreads(0)
    return [examine(pair, opencv) for pair in pairs]


def survey(
    pairs: Sequence[tuple[str, str | None]],
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    opencv: bool = True,
) -> Survey:
    """Read every image and label once.

    Args:
        pairs: Paths of images and of their labels (None: there are none).
        workers: Processes to read with; 0 reads in this one.
        progress: Called with how many samples were read since the last call.
        sizes: Width and height that the annotations give each image.
        opencv: Whether training decodes the images with OpenCV.
    """
    sizes = sizes or {}
    found = Survey()
    for chunk, facts in _results(pairs, workers, opencv):
        for (image, label), fact in zip(chunk, facts):
            found.add(image, label, fact, sizes.get(image))
        progress(len(chunk))
    return found


def _results(pairs: Sequence, workers: int, opencv: bool) -> Iterator[tuple[Sequence, list[Facts]]]:
    examine_chunk = functools.partial(_examine_chunk, opencv=opencv)
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    if not workers:
        yield from ((chunk, examine_chunk(chunk)) for chunk in chunks)
        return
    # fork would copy torch's threads and locks into the readers
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(chunks, pool.map(examine_chunk, chunks))


def label_findings(
    found: Survey,
    num_classes: int | None,
    reduce_zero_label: bool,
    label_map: Mapping[int, int] | None = None,
    ignore_index: int = IGNORED,
) -> list[Finding]:
    """What a survey says about labels.

    Args:
        found: Of a split with label images.
        num_classes: Of the data set; None if it does not say.
        reduce_zero_label: As the data set has it.
        label_map: As the data set has it, where classes of its own were chosen.
        ignore_index: An id that is ignored besides 255.
    """
    findings = list(found.faults)
    if found.coloured:
        findings.append(
            Finding(
                f'{len(found.coloured)} labels have colours in place of ids '
                f'({listed(found.coloured)})',
                'write labels as images of one channel (mode L or P), colours replaced by ids',
            )
        )
    if found.misfits:
        findings.append(
            Finding(
                f'{len(found.misfits)} images have another size than their labels or annotations '
                f'({listed(found.misfits)})',
                'check that they belong together; label images are resized with nearest neighbour',
            )
        )
    if num_classes is None or not found.pixels:
        return findings
    classes, ignored = ids_of(num_classes, reduce_zero_label, label_map)
    ignored = ignored | {ignore_index}
    wrong = sorted(set(found.pixels) - set(classes) - ignored)
    if wrong:
        files = listed(f'{value} in {found.examples[value]}' for value in wrong[:_SHOWN])
        findings.append(
            Finding(
                f'ids that are no class: {listed(wrong)}; the {num_classes} classes have '
                f'{min(classes)} to {max(classes)} ({files})',
                id_remedy(wrong, num_classes, reduce_zero_label),
            )
        )
    if not any(found.pixels[value] for value in classes):
        findings.append(
            Finding(
                'every pixel is ignored',
                'check reduce_zero_label, and which ids the labels have: '
                + listed(sorted(found.pixels)),
            )
        )
    findings += _unlearnable(found, classes, ignored, wrong)
    if label_map is None:
        findings += _reduce_zero_label_advice(found, num_classes, reduce_zero_label)
    return findings


def ids_of(
    num_classes: int, reduce_zero_label: bool, label_map: Mapping[int, int] | None = None
) -> tuple[dict[int, int], set[int]]:
    """What ids of label files mean.

    Returns:
        tuple: The class of each id that has one, and the ids that are ignored.
    """
    first = int(reduce_zero_label)
    mapped = label_map or {value: value for value in range(num_classes)}
    classes = {old + first: new for old, new in mapped.items() if new != IGNORED}
    ignored = {IGNORED} | {old + first for old, new in mapped.items() if new == IGNORED}
    return classes, ignored | ({0} if reduce_zero_label else set())


def _unlearnable(
    found: Survey, classes: Mapping[int, int], ignored: set[int], wrong: Sequence[int]
) -> Iterator[Finding]:
    nothing = [path for path, ids in found.only if ids <= ignored]
    if nothing and len(nothing) < found.samples:
        yield Finding(
            f'{len(nothing)} labels have nothing but ignored pixels ({listed(nothing)})',
            'they teach nothing: leave them out, or label them',
            serious=False,
        )
    absent = [value for value in classes if not found.pixels[value]]
    if absent and not wrong:
        yield Finding(
            f'{len(absent)} of the {len(classes)} classes never occur (ids {listed(absent)})',
            'nothing can be learnt of them: check metainfo.classes, or add examples',
            serious=False,
        )


def _reduce_zero_label_advice(
    found: Survey, num_classes: int, reduce_zero_label: bool
) -> Iterator[Finding]:
    """Whether ids look as if they were counted from the other number."""
    total = sum(found.pixels.values())
    ids = set(found.pixels) - {IGNORED}
    largest = max(ids, default=0)
    if reduce_zero_label and ids and largest <= num_classes - 1 and found.pixels[0]:
        yield Finding(
            f'reduce_zero_label=True ignores id 0, which {found.pixels[0] / total:.1%} of the '
            f'pixels have, and class {num_classes - 1} (id {num_classes}) never occurs: ids seem '
            'to be classes from 0 on',
            'set reduce_zero_label=False in the data set, unless 0 is to be ignored',
            serious=False,
        )
    if not reduce_zero_label and ids and not found.pixels[0] and largest == num_classes:
        yield Finding(
            f'ids count from 1 to {num_classes}, and 0 never occurs',
            'set reduce_zero_label=True in the data set',
            serious=False,
        )


def duplicates(first: Survey, second: Survey) -> list[tuple[str, str]]:
    """Images of the same content in two splits."""
    shared = first.digests.keys() & second.digests.keys()
    return sorted((first.digests[digest], second.digests[digest]) for digest in shared)


def spread(count: int, of: int) -> list[int]:
    """Positions of ``count`` samples out of ``of``, from the first to the last."""
    if count >= of:
        return list(range(of))
    return sorted({round(i * (of - 1) / max(count - 1, 1)) for i in range(count)})


def summary(counter: Counter, of: str) -> str:
    """``L 2000, P 3``, most common first."""
    common = itertools.islice(counter.most_common(), 4)
    more = f' and {len(counter) - 4} other {of}' if len(counter) > 4 else ''
    return ', '.join(f'{value} {count}' for value, count in common) + more
