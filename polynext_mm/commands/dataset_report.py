"""Tables and pictures of what `polynext-mm check-dataset` finds in the data sets of a config."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.utils import ProgressBar
from PIL import Image, ImageDraw

# importing the package registers everything and provides mmcv.ops before mm is imported
from polynext_mm.datasets import Finding, survey
from polynext_mm.engine import launch
from polynext_mm.engine.checks import config as config_checks
from polynext_mm.engine.checks import data as data_checks
from polynext_mm.engine.checks.coco import CocoAudit, read_coco
from polynext_mm.engine.checks.decoding import Decoder, image_decoder, label_decoder
from polynext_mm.engine.checks.sizes import size_findings
from polynext_mm.engine.checks.survey import (
    Survey,
    duplicates,
    ids_of,
    label_findings,
    spread,
    summary,
)
from polynext_mm.written import require_apart

_SIDE = 512
_GREY = (128, 128, 128)


@dataclass
class Split:
    """A data set of a config and what was found in it."""

    place: str
    source: object
    pairs: list[tuple[str, str | None]]
    findings: list[Finding]
    audit: CocoAudit | None
    decoder: Decoder | None  # for images, in training
    label_decoder: Decoder
    found: Survey = field(default_factory=Survey)


def splits_of(cfg: Config) -> Iterator[Split]:
    """Return the data sets of a config, each once, with their lists read."""
    seen = []
    for task in config_checks.TASKS:
        loader = cfg.get(f'{task}_dataloader') or {}
        for place, settings in config_checks.datasets_of(
            loader.get('dataset'), f'{task}_dataloader.dataset'
        ):
            sources = {key: settings.get(key) for key in ('data_root', 'ann_file', 'data_prefix')}
            if sources in seen:
                continue
            seen.append(sources)
            launch.require_dataset(settings)
            steps = settings.get('pipeline') or ()
            decoders = image_decoder(steps), label_decoder(steps)
            source = data_checks.lazily_built(cfg, settings, place)
            if source is None:
                print(
                    f"{place}: {settings.get('type')} is neither mmseg's nor COCO's: not looked at"
                )
            elif hasattr(source, 'label_map'):
                pairs, findings = data_checks.list_pairs(source, place)
                pairs = [pair for pair in pairs if all(map(os.path.exists, filter(None, pair)))]
                if task != 'train':
                    findings += size_findings(cfg, task, settings, [image for image, _ in pairs])
                yield Split(place, source, pairs, findings, None, *decoders)
            else:
                audit = data_checks.audit(source, settings)
                paths = [os.path.join(source.data_prefix['img'], name) for name in audit.files]
                pairs = [(path, None) for path in paths if os.path.exists(path)]
                yield Split(place, source, pairs, list(audit.findings), audit, *decoders)


def require_pictures_apart(splits: Sequence[Split], folder: Path, count: int) -> None:
    """Check that no picture would overwrite a data file.

    Raises:
        OverwriteError: If one would, naming it.
    """
    targets = [
        ('--pictures', target) for split in splits for *_, target in _pictures(split, folder, count)
    ]
    files = [path for split in splits for pair in split.pairs for path in pair if path]
    require_apart(targets, files)


def read(split: Split, workers: int) -> None:
    """Read every file of a split, with a progress bar."""
    if not split.pairs:
        return
    print(f'{split.place}: reading {len(split.pairs)} samples')
    bar = ProgressBar(len(split.pairs), file=sys.stderr)
    sizes = {}
    if split.audit is not None:
        folder = split.source.data_prefix['img']
        sizes = {os.path.join(folder, name): size for name, size in split.audit.files.items()}
    split.found = survey(
        split.pairs, workers, bar.update, sizes, split.decoder, split.label_decoder
    )
    print(file=sys.stderr)
    source = split.source
    if split.audit is not None:
        split.findings += label_findings(split.found, None, False)
    else:
        classes = source.metainfo.get('classes')
        split.findings += label_findings(
            split.found,
            None if classes is None else len(classes),
            source.reduce_zero_label,
            source.label_map,
            source.ignore_index,
        )
    if split.found.repeated:
        first, second = split.found.repeated[0]
        split.findings.append(
            Finding(
                f'{len(split.found.repeated)} images occur more than once '
                f'(e.g. {first} and {second})',
                'they count that many times: keep one of each',
                serious=False,
            )
        )


def of_config(cfg: Config) -> Iterator[Finding]:
    """Find contradictions in the config's settings of classes and pixels."""
    yield from data_checks.class_findings(cfg)
    yield from data_checks.scale_findings(cfg)


def shared(splits: Sequence[Split]) -> Iterator[Finding]:
    """Find training images that are also evaluated on."""
    for train in splits:
        for other in splits:
            if train.place.startswith('train') and not other.place.startswith('train'):
                twins = duplicates(train.found, other.found)
                if twins:
                    yield Finding(
                        f'{len(twins)} images of {other.place} are in {train.place} as well '
                        f'(e.g. {twins[0][1]} is {twins[0][0]})',
                        'take them out of one of both: results would be too good',
                    )


# What is printed


def table(split: Split) -> Iterator[str]:
    found = split.found
    yield f'{split.place} ({type(split.source).__name__})'
    yield f'  images          {found.samples} read, {len(found.faults)} broken'
    if found.sizes:
        widths, heights = zip(*found.sizes.elements())
        for name, values in (('widths', widths), ('heights', heights)):
            yield (
                f'  {name:<16}{min(values)} to {max(values)}, median '
                f'{statistics.median_low(values)}'
            )
        yield f'  modes           {summary(found.modes, "modes")}'
    if split.audit is not None:
        yield from box_rows(split.audit)
    elif found.pixels:
        yield f'  label modes     {summary(found.label_modes, "modes")}'
        yield from id_rows(split)


def box_rows(audit: CocoAudit) -> Iterator[str]:
    if audit.kept < audit.images:
        yield f'  trained on      {audit.kept} of {audit.images} images, by filter_cfg'
    yield f'  boxes           {audit.boxes}, of which {sum(audit.usable.values())} usable'
    yield f'  {"class":<28}{"boxes":>10}{"images":>10}'
    for name, boxes in audit.usable.items():
        yield f'  {name:<28}{boxes:>10}{audit.with_class[name]:>10}'


def id_rows(split: Split) -> Iterator[str]:
    found, names = split.found, split.source.metainfo.get('classes') or ()
    classes, ignored = ids_of(len(names), split.source.reduce_zero_label, split.source.label_map)
    total = sum(found.pixels.values())
    unused = sum(found.pixels[value] for value in ignored)
    yield f'  ignored         {unused / total:.2%} of all pixels'
    yield f'  {"id":>5} {"class":<28}{"pixels":>9}{"images":>10}'
    for value in sorted(set(found.pixels) | set(classes)):
        if value in classes:
            name = str(names[classes[value]])
        else:
            name = '(ignored)' if value in ignored else '(no class)'
        share = found.pixels[value] / total
        yield f'  {value:>5} {name:<28}{share:>9.3%}{found.images_with[value]:>10}'


# Pictures


def _pictures(split: Split, folder: Path, count: int) -> Iterator[tuple[str, str | None, Path]]:
    """Yield the images to draw, their labels, and the files to write."""
    task, _, part = split.place.partition('_dataloader.dataset')
    for position in spread(count, len(split.pairs)):
        image, label = split.pairs[position]
        yield image, label, folder / f'{task}{part}_{position}_{Path(image).stem}.png'


def draw(split: Split, folder: Path, count: int) -> list[Path]:
    """Write some samples with their labels beside them."""
    paint = boxes_painter(split) if split.audit is not None else paint_label
    written = []
    for image, label, target in _pictures(split, folder, count):
        if image in split.found.broken:
            continue
        picture = (split.decoder or Decoder()).picture(Path(image).read_bytes())
        painted = paint(split, picture, image, label)
        both = Image.new('RGB', (picture.width * 2, picture.height))
        both.paste(picture)
        both.paste(painted, (picture.width, 0))
        both.thumbnail((2 * _SIDE, _SIDE))
        target.parent.mkdir(parents=True, exist_ok=True)
        both.save(target)
        written.append(target)
    return written


def paint_label(split: Split, picture: Image.Image, image: str, label: str) -> Image.Image:
    """Return the picture in the colours of its classes; ignored pixels are grey."""
    source = split.source
    palette = source.metainfo.get('palette') or []
    classes, _ = ids_of(len(palette), source.reduce_zero_label, source.label_map)
    content = Path(label).read_bytes()
    ids = split.label_decoder.decode(content)
    if ids.ndim != 2:
        return split.label_decoder.picture(content).resize(picture.size, Image.NEAREST)
    painted = np.full((*ids.shape, 3), _GREY, np.uint8)
    for value, index in classes.items():
        painted[ids == value] = palette[index]
    painted = Image.fromarray(painted).resize(picture.size, Image.NEAREST)
    return Image.blend(picture, painted, 0.6)


def boxes_painter(split: Split):
    """Return a function that draws the boxes of an image with the names of their categories."""
    content = read_coco(split.audit.path)
    names = {category['id']: category['name'] for category in content['categories']}
    images = {
        os.path.join(split.source.data_prefix['img'], entry['file_name']): entry['id']
        for entry in content['images']
    }
    boxes: dict[object, list] = {}
    for entry in content['annotations']:
        boxes.setdefault(entry['image_id'], []).append(entry)

    def paint(_: Split, picture: Image.Image, image: str, label: None) -> Image.Image:
        painted = picture.copy()
        pen = ImageDraw.Draw(painted)
        for entry in boxes.get(images[image], ()):
            x, y, width, height = entry['bbox']
            # an empty box shows only a corner
            corner = max(x + width, x + 1), max(y + height, y + 1)
            pen.rectangle((x, y, *corner), outline=(255, 220, 0), width=2)
            pen.text((x + 3, y + 2), str(names.get(entry['category_id'], '?')), fill=(255, 220, 0))
        return painted

    return paint
