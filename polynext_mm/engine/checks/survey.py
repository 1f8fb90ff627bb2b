"""Read a whole data set once, in parallel, for the table of `polynext-mm check-dataset`."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from .decoding import (
    LABELS,
    Decoder,
    Header,
    allow_large_images,
    count_ids,
    read_header,
)
from .findings import (
    IGNORED,
    UNREADABLE,
    Finding,
    binary_fault,
    bits_finding,
    described,
    file_fault,
    id_remedy,
    label_fault,
    listed,
    lossy_label,
    opencv_fault,
    size_fault,
    times,
    value_fault,
)

_CHUNK = 32
_AHEAD = 4  # how many chunks each thread may read ahead
_SHOWN = 3
_LISTED = 20  # files that cannot be read for the same reason
_REDUCIBLE = 16  # smallest side that OpenCV can decode at an eighth
_IMAGES = Decoder()


class Facts(NamedTuple):
    """What was read of a sample.

    Attributes:
        size: Width and height of the image as training sees it.
        mode: Of the image, as Pillow names it.
        bits: Bits per channel of the image if training keeps only 8 of them, else 0.
        may_be_turned: Whether EXIF turns or mirrors the image without changing its size.
        digest: Of the bytes of the image file.
        label_size: Width and height of the label.
        label_mode: Of the label.
        ids: Pixels of each id in the label file.
        fault: Why one of the files could not be read.
    """

    size: tuple[int, int] | None = None
    mode: str = ''
    bits: int = 0
    may_be_turned: bool = False
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
        pixels: Of each id in the files.
        images_with: Images that have each id.
        digests: Of the contents of image files, with the path of the first that has it.
        repeated: Images with the same content.
        faults: Files that cannot be read.
        broken: Images that cannot be read, or whose labels cannot.
        misfits: Labels whose size is not their image's.
        misplaced: Images whose size is not the one in their annotations.
        deep: Images that lose bits in training, and their bits.
        turned: Images that EXIF turns or mirrors without changing their size.
        coloured: Labels with more than one channel.
        only: Labels with one or two ids, and these ids.
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
    misplaced: list[Finding] = field(default_factory=list)
    deep: list[tuple[str, int]] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
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
            listed_size: Width and height of the image according to the annotations.
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
        if facts.bits:
            self.deep.append((image, facts.bits))
        if facts.may_be_turned:
            self.turned.append(image)
        if listed_size and tuple(listed_size) != facts.size:
            self.misplaced.append(size_fault(image, facts.size, listed_size))
        if facts.label_mode:
            self.label_modes[facts.label_mode] += 1
        if facts.ids is None:
            if label is not None:
                self.coloured.append(label)
            return
        if facts.label_size != facts.size:
            self.misfits.append(
                f'{label} ({times(facts.label_size)}, its image {times(facts.size)})'
            )
        self.pixels.update(facts.ids)
        self.images_with.update(facts.ids.keys())
        if len(facts.ids) <= 2:
            self.only.append((label, frozenset(facts.ids)))
        for identity in facts.ids:
            self.examples.setdefault(identity, label)


def examine(
    image: str,
    label: str | None = None,
    decoder: Decoder | None = _IMAGES,
    label_decoder: Decoder = LABELS,
) -> Facts:
    """Read an image and, if there is one, its label, as training does.

    Args:
        image: Its path.
        label: Its label's path.
        decoder: Of the image; None if it is not known how training reads it.
        label_decoder: Of the label.
    """
    allow_large_images()
    try:
        with open(image, 'rb') as file:
            content = file.read()
    except OSError:
        return Facts(fault=_fault(image))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    facts = _image_facts(image, content, decoder)._replace(digest=digest)
    if label is None or facts.fault:
        return facts
    return facts._replace(**_label_facts(label, label_decoder))


def _image_facts(image: str, content: bytes, decoder: Decoder | None) -> Facts:
    try:
        header: Header | None = read_header(content, decoder or _IMAGES)
    except UNREADABLE:
        header = None
    if decoder is None:
        return Facts(header.size, header.mode) if header else Facts()
    if header and decoder == _IMAGES and min(header.size) >= _REDUCIBLE:
        # decoding at an eighth of the resolution takes a quarter of the time, and still reads all
        reduced = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
        if reduced is None:
            return Facts(fault=file_fault(image) or opencv_fault(image) or _unreadable(image))
        size = header.size
    else:
        try:
            pixels = decoder.decode(content)
        except Exception as error:  # noqa: BLE001 - decoders can raise anything
            return Facts(fault=file_fault(image) or _unreadable(image, error))
        if pixels is None:
            return Facts(fault=file_fault(image) or opencv_fault(image) or _unreadable(image))
        size = pixels.shape[1], pixels.shape[0]
        if header is None:
            channels = pixels.shape[2] if pixels.ndim > 2 else 1
            return Facts(size, f'{channels} x {pixels.dtype}')
    bits = header.bits if header.bits > 8 and decoder.flag != 'unchanged' else 0
    return Facts(size, header.mode, bits, header.may_be_turned)


def _label_facts(label: str, decoder: Decoder) -> dict:
    try:
        with open(label, 'rb') as file:
            content = file.read()
        pixels = decoder.decode(content)
    except Exception as error:  # noqa: BLE001 - decoders can raise anything
        return dict(fault=file_fault(label) or _unreadable(label, error))
    if pixels is None:
        return dict(fault=file_fault(label) or opencv_fault(label) or _unreadable(label))
    try:
        header: Header | None = read_header(content, decoder)
    except UNREADABLE:
        header = None
    if header and header.format in ('JPEG', 'MPO'):
        return dict(fault=lossy_label(label))
    size = pixels.shape[1], pixels.shape[0]
    found = dict(label_size=size, label_mode=header.mode if header else str(pixels.dtype))
    pixels = pixels.squeeze()
    if pixels.ndim > 2:
        return found
    # integers beyond 8 bits are counted, and reported as ids that are not classes
    fault = label_fault(pixels, None, None)
    if fault is None and pixels.dtype.kind == 'f':
        fault = value_fault(pixels)
    if fault:
        return dict(fault=Finding(f'{described(label)} {fault.what}', fault.remedy))
    ids = count_ids(pixels)
    if -1 in ids:  # as mmseg converts it
        ids[IGNORED] = ids.get(IGNORED, 0) + ids.pop(-1)
    return dict(found, ids=ids)


def _fault(path: str) -> Finding:
    return file_fault(path) or _unreadable(path)


def _unreadable(path: str, error: Exception | None = None) -> Finding:
    reason = '' if error is None else f' ({type(error).__name__}: {" ".join(str(error).split())})'
    return Finding(
        f'{described(path)} cannot be read by the decoder that the pipeline names{reason}',
        'set imdecode_backend of the loading step to one that reads it',
    )


def survey(
    pairs: Sequence[tuple[str, str | None]],
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    decoder: Decoder | None = _IMAGES,
    label_decoder: Decoder = LABELS,
) -> Survey:
    """Read every image and label once.

    Args:
        pairs: Paths of images and of their labels (None: there are none).
        workers: Threads to read with; 0 reads in the calling thread.
        progress: Called with how many samples were read since the last call.
        sizes: Width and height of each image according to the annotations.
        decoder: Of the images; None if it is not known how training reads them.
        label_decoder: Of the labels.
    """
    sizes = sizes or {}
    found = Survey()

    def examine_chunk(chunk: Sequence[tuple[str, str | None]]) -> list[Facts]:
        return [examine(image, label, decoder, label_decoder) for image, label in chunk]

    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    for chunk, facts in zip(chunks, _in_order(examine_chunk, chunks, workers)):
        for (image, label), fact in zip(chunk, facts):
            found.add(image, label, fact, sizes.get(image))
        progress(len(chunk))
    return found


def _in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Map in threads, keeping the order; decoders and hashes run in parallel."""
    if not workers:
        yield from map(work, items)
        return
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # the pool's threads are enough
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        cv2.setNumThreads(threads)


def label_findings(
    found: Survey,
    num_classes: int | None,
    reduce_zero_label: bool,
    label_map: Mapping[int, int] | None = None,
    ignore_index: int = IGNORED,
) -> list[Finding]:
    """Yield what a survey found about labels.

    Args:
        found: The survey of a split with label images.
        num_classes: Of the data set; None if it does not say.
        reduce_zero_label: The setting of the data set.
        label_map: The mapping of the data set, if classes were selected.
        ignore_index: An id that is ignored besides 255.
    """
    findings = [*_faults(found), *_image_findings(found)]
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
                f'{len(found.misfits)} images have another size than their labels '
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
        names_ids = label_map is not None and num_classes in label_map.values()  # OwnSegDataset
        known = listed(sorted(classes)) if names_ids else f'{min(classes)} to {max(classes)}'
        findings.append(
            Finding(
                f'ids that are no class: {listed(wrong)}; the {num_classes} classes have {known} '
                f'({files})',
                f'add them to label_map, with {IGNORED} where they are no class'
                if names_ids
                else id_remedy(wrong, num_classes, reduce_zero_label),
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
    mapped = {classes.get(value, value) for value in found.pixels}
    binary = binary_fault(mapped, num_classes)
    if binary:
        findings.append(Finding(f'{found.samples} labels {binary.what}', binary.remedy))
    findings += _unlearnable(found, classes, ignored, wrong)
    if label_map is None:
        findings += _reduce_zero_label_advice(found, num_classes, reduce_zero_label)
    return findings


def _faults(found: Survey) -> Iterator[Finding]:
    """Yield files that cannot be read; if many have the same reason, the first ones."""
    counts = Counter(fault.remedy for fault in found.faults)
    shown: Counter = Counter()
    for fault in found.faults:
        shown[fault.remedy] += 1
        more = counts[fault.remedy] - _LISTED
        if more <= 0 or shown[fault.remedy] <= _LISTED:
            yield fault
        elif shown[fault.remedy] == _LISTED + 1:
            yield Finding(f'{more} more files like the last of them', fault.remedy)


def _image_findings(found: Survey) -> Iterator[Finding]:
    if found.misplaced:
        first = found.misplaced[0]
        yield Finding(
            f'{len(found.misplaced)} images have another size than their annotations say '
            f'({listed(finding.what for finding in found.misplaced)})',
            first.remedy,
        )
    if found.turned:
        yield Finding(
            f'{len(found.turned)} images are turned or mirrored by EXIF in a way that their size '
            f'does not show ({listed(found.turned)})',
            'look at the pictures: labels and boxes must lie on their objects there, as they do in '
            "training; color_type='color_ignore_orientation' in LoadImageFromFile leaves the "
            'images unturned',
            serious=False,
        )
    if found.deep:
        first = bits_finding(*found.deep[0])
        count = len(found.deep)
        yield first._replace(what=f'{count} images of more than 8 bits a sample: {first.what}')


def ids_of(
    num_classes: int, reduce_zero_label: bool, label_map: Mapping[int, int] | None = None
) -> tuple[dict[int, int], set[int]]:
    """Return what the ids in label files mean.

    Returns:
        tuple: The class of each id that has one, and the ids that are ignored.
    """
    first = int(reduce_zero_label)
    mapped = label_map or {value: value for value in range(num_classes)}
    # OwnSegDataset maps invalid ids to the first number beyond the classes
    classes = {old + first: new for old, new in mapped.items() if new < num_classes}
    ignored = {IGNORED} | {old + first for old, new in mapped.items() if new == IGNORED}
    if reduce_zero_label:
        ignored.add(0)
    return classes, ignored - classes.keys()


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
            'they cannot be learnt: check metainfo.classes, or add examples',
            serious=False,
        )


def _reduce_zero_label_advice(
    found: Survey, num_classes: int, reduce_zero_label: bool
) -> Iterator[Finding]:
    """Report ids that look as if reduce_zero_label should have the other value."""
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
    """Return images with the same content in two splits."""
    shared = first.digests.keys() & second.digests.keys()
    return sorted((first.digests[digest], second.digests[digest]) for digest in shared)


def spread(count: int, of: int) -> list[int]:
    """Return the positions of ``count`` evenly spread samples out of ``of``."""
    if count >= of:
        return list(range(of))
    return sorted({round(i * (of - 1) / max(count - 1, 1)) for i in range(count)})


def summary(counter: Counter, of: str) -> str:
    """Format counts, most common first: ``L 2000, P 3``."""
    common = itertools.islice(counter.most_common(), 4)
    more = f' and {len(counter) - 4} other {of}' if len(counter) > 4 else ''
    return ', '.join(f'{value} {count}' for value, count in common) + more
