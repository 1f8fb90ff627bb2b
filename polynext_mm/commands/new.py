"""Write a config to train on a folder: ``polynext-mm new segmentation|detection FOLDER``."""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..folders import FolderError
from .arguments import positive

# GPU memory in GB for a training step of UperNet with CPolyNeXt-S in bfloat16, per 512x512 image
# and allocated once: rounded up, so that the first batch fits.
_GB_PER_IMAGE, _GB_ONCE = 1.6, 3.0


class Machine(NamedTuple):
    """The machine that a training must fit.

    Attributes:
        name: As printed.
        memory: Of the GPU, in GB; None on a CPU.
    """

    name: str
    memory: float | None

    @classmethod
    def this(cls) -> Machine:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            return cls(properties.name, properties.total_memory / 2**30)
        return cls(f'{os.cpu_count()} CPU cores, no GPU', None)

    def batch_size(self, pixels: int, number: int) -> int:
        """Return how many images of ``pixels`` make a batch: a power of 2, at most 1/4 of all."""
        if self.memory is None:
            most = 4
        else:
            most = int((self.memory - _GB_ONCE) / (_GB_PER_IMAGE * pixels / 512**2))
        most = max(2, min(16, most, number // 4))
        return 2 ** (most.bit_length() - 1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm new',
        description='Look at a folder of images and annotations, and write a config that trains '
        'on it. The folder itself stays as it is',
        epilog='for example: polynext-mm new segmentation /data/roofs\n'
        '             polynext-mm train roofs.py\n'
        '             polynext-mm predict photo.jpg work_dirs/roofs',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('task', choices=['segmentation', 'detection'])
    parser.add_argument('folder', type=Path, help='of the data')
    parser.add_argument(
        '--out', type=Path, help='config to write (default: NAME.py here, of the folder)'
    )
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='names of the classes, in the order of their ids (default: as found)',
    )
    parser.add_argument(
        '--arch', help='network (default: cpolynext_s on a GPU, cpolynext_t on a CPU)'
    )
    parser.add_argument(
        '--iterations', type=positive, help='of the training (default: for the number of images)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the split (default: %(default)s)')
    parser.add_argument(
        '--from-scratch', action='store_true', help='do not start from ImageNet weights'
    )
    parser.add_argument('--force', action='store_true', help='replace the config if it exists')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    from polynext_mm.nn import ARCHS

    if args.arch is not None and args.arch not in ARCHS:
        parser.error(f'argument --arch: {args.arch!r} is not one of {", ".join(ARCHS)}')
    if not args.folder.is_dir():
        parser.error(f'there is no folder {args.folder}')
    root = args.folder.resolve()
    name = re.sub(r'\W+', '_', root.name).strip('_').lower() or 'mine'
    config = args.out or Path(f'{name}.py')
    if config.suffix != '.py':
        parser.error(f'--out: a config ends in .py, got {config}')
    if config.exists() and not args.force:
        sys.exit(f'{config} exists: use --out for another file, or --force to replace it')
    machine = Machine.this()
    # beside the config, so that the data folder is unchanged
    files = config.with_name(f'{config.stem}_files').resolve()
    if files.exists() and not args.force:
        sys.exit(f'{files} exists: use --out for another name, or --force to replace what is in it')
    write = segmentation if args.task == 'segmentation' else detection
    try:
        text = write(root, files, machine, args)
    except (FolderError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text, encoding='utf-8')
    print(f'wrote {config}')
    print(f'next: polynext-mm check-dataset {config} --fix-hints')
    print(f'      polynext-mm train {config}')
    return 0


def say(what: str, value: object) -> None:
    print(f'  {what:<14}{value}')


# ------------------------------------------------------------------------------------------------
# Segmentation
# ------------------------------------------------------------------------------------------------


def segmentation(root: Path, files: Path, machine: Machine, args: argparse.Namespace) -> str:
    """Look at a folder of images and labels, and return the config."""
    from polynext_mm.folders import masks
    from polynext_mm.folders.files import image_size, listed_splits, spread
    from polynext_mm.folders.pairs import find_pairs
    from polynext_mm.folders.splits import alike, split

    print(f'{root}:')
    found = find_pairs(root)
    start = 'train' if 'train' in found else None
    if start not in found:
        raise nothing_to_train_on(root, found)
    for key, pairs in found.items():
        say(key or 'images', f'{len(pairs.names)}, {pairs.images or "."}/*{pairs.image_suffix}')
        say('  labels', f'{pairs.labels}/*{pairs.label_suffix}')
        if pairs.unlabelled:
            say('  left out', f'{pairs.unlabelled} images without a label')
    images = [path for pairs in found.values() for path in pairs.image_paths(root)]
    labels = [path for pairs in found.values() for path in pairs.label_paths(root)]
    sizes = [image_size(path) for path in spread(images, 200)]
    say('sizes', sizes_in_words(sizes))
    values = masks.count_values(labels)
    classes, ids = classes_of(root, values, args.classes)
    total = sum(values.pixels.values())
    say('classes', f'{len(classes)}, in the labels as {"colours" if values.coloured else "ids"}')
    for value, index in sorted(ids.items(), key=lambda pair: pair[1]):
        shown = masks.unpacked(value) if values.coloured else value
        what = 'ignored' if index == masks.IGNORED else classes[index].name
        share = values.pixels[value] / total
        print(f'    {what:<24}{shown!s:>16}{share:>9.2%}{values.images[value]:>7} images')

    # where labels are read from: as they are, or converted to ids in a folder of ours
    folders = {key: str(pairs.labels) for key, pairs in found.items()}
    suffixes = {key: pairs.label_suffix for key, pairs in found.items()}
    converts = values.coloured or values.has_channels
    if converts:
        for key, pairs in found.items():
            folder = files / 'labels' / (key or '')
            folders[key], suffixes[key] = str(folder), '.png'
            for name, path in zip(pairs.names, pairs.label_paths(root)):
                masks.write_ids(path, folder / f'{name}.png', ids, values.coloured)
        say('wrote', f'labels with ids: {files / "labels"}')

    # the split to train on
    source = found[start]
    lists: dict[str, str] = {}
    sides: dict[str, list[str]] = {}
    if 'val' not in found:
        names = source.names
        stems = {Path(name).name: name for name in names}
        listed = listed_splits(root, [Path(name).name for name in names]) if start is None else {}
        if listed:
            say('split', 'as listed: ' + ', '.join(f'{len(v)} {k}' for k, v in listed.items()))
            sides = {key: sorted(stems[stem] for stem in listed[key]) for key in listed}
            others = set(stems).difference(*listed.values())
            if others:
                say('  left out', f'{len(others)} images that no list names')
        else:
            groups = alike(source.image_paths(root))
            held = [
                {ids[value] for value in held if ids[value] != masks.IGNORED} for held in values.of
            ]
            offset = labels.index(source.label_paths(root)[0])
            train, val = split(groups, {i: held[offset + i] for i in range(len(names))}, args.seed)
            require_validation(root, val)
            sides = dict(train=[names[i] for i in train], val=[names[i] for i in val])
            say('split', f'{len(train)} train, {len(val)} val, {told(groups)}')
    for key, pairs in found.items():  # mmseg would take all files of the folders
        if key is not None and (pairs.unlabelled or pairs.images == pairs.labels):
            sides.setdefault(key, pairs.names)
    for key, side in sides.items():
        files.mkdir(parents=True, exist_ok=True)
        lists[key] = str(files / f'{key}.txt')
        Path(lists[key]).write_text('\n'.join(side) + '\n', encoding='utf-8')
    keys = ('train', 'val', 'test') if 'test' in found or 'test' in lists else ('train', 'val')
    key_of = {key: key if key in found else start for key in keys}
    if len({(found[k].image_suffix, suffixes[k]) for k in key_of.values()}) > 1:
        say('note', 'files of the splits end differently: each has its suffixes in the config')
    number = len(sides.get('train', source.names))
    side = min(512, max(64, 32 * round(median(min(size) for size in sizes) / 32)))
    side = side if machine.memory else min(side, 256)
    plan = planned(machine, side * side, number, args)
    say('network', f'{plan["arch"]}, crops of {side}x{side}, {plan["batch"]} in a batch')
    say('schedule', f'{plan["iterations"]} iterations ({machine.name})')
    large = median(min(size) for size in sizes) > 2 * side

    def dataset(key: str) -> str:
        place = key_of[key]
        lines = [
            f'    data_prefix=dict(img_path={str(found[place].images)!r}, '
            f'seg_map_path={folders[place]!r}),',
            f'    img_suffix={found[place].image_suffix!r},',
            f'    seg_map_suffix={suffixes[place]!r},',
        ]
        if key in lists:
            lines.append(f'    ann_file={lists[key]!r},')
        return '\n'.join(lines)

    identity = converts or all(value == index for value, index in ids.items())
    label_map = '' if identity else f'    label_map={ids!r},  # ids in the files: classes\n'
    test = 'test' if 'test' in key_of else 'val'
    text = _SEGMENTATION.format(
        command=command_of(args),
        classes=lines_of([colour.name for colour in classes]),
        palette=lines_of([list(colour.rgb) for colour in classes], brackets='[]'),
        root=str(root),
        label_map=label_map,
        side=side,
        batch=plan['batch'],
        workers=plan['workers'],
        train=dataset('train'),
        val=dataset('val'),
        arch=plan['arch'],
        init=init_of(args),
        light=', channels=128' if machine.memory is None else '',
        iterations=plan['iterations'],
        interval=plan['interval'],
        warmup=plan['warmup'],
        log=plan['log'],
        test_loader=''
        if test == 'val'
        else f'\ntest_set = dict(\n    dataset,\n{dataset("test")}\n)',
        test_of='val_dataloader'
        if test == 'val'
        else f'dict(num_workers={plan["workers"]}, dataset=test_set)',
        slide=f"    test_cfg=dict(\n        _delete_=True, mode='slide', crop_size=crop_size, "
        f'stride=({side * 2 // 3}, {side * 2 // 3})\n    ),\n'
        if large
        else '',
        clip=clip_of(plan['arch']),
        clip_wrapper=clip_of(plan['arch'], wrapper=True),
        lr=rate_of(args),
        heads=heads_of(args),
    )
    return text


def classes_of(root: Path, values, given: Sequence[str] | None) -> tuple[list, dict[int, int]]:
    """Return the classes, as names and colours, and the class of each value in the labels.

    Raises:
        FolderError: If names do not fit the values.
    """
    from polynext_mm.folders import masks

    if values.coloured:
        table = masks.colour_table(root)
        if table:
            say('colours', f'named in {table[0]}')
        classes = masks.named_colours(values, table[1] if table else None)
        if given:
            masks.check_number(given, len(classes))
            classes = [c._replace(name=name) for c, name in zip(classes, given)]
        ids = {(r << 16) | (g << 8) | b: i for i, (_, (r, g, b)) in enumerate(classes)}
        strange = [masks.unpacked(value) for value in values.pixels if value not in ids]
        if strange:
            raise FolderError(
                f'{len(strange)} colours of the labels are not in {table[0]}, such as '
                f'{strange[0]}: add them, or take the file away for classes of all colours'
            )
        return classes, ids
    listed = masks.class_names(root)
    names, ids = masks.numbered(values, given or (listed[1] if listed else ()))
    if listed and not given:
        say('names', f'from {listed[0]}')
    colours = [colour_of(index, len(names)) for index in range(len(names))]
    return [masks.Colour(name, colour) for name, colour in zip(names, colours)], ids


def colour_of(index: int, number: int) -> tuple[int, int, int]:
    """Return a colour for a class: black for the first, then hues around the colour wheel."""
    if index == 0:
        return 0, 0, 0
    red, green, blue = colorsys.hsv_to_rgb((index - 1) / max(number - 1, 1), 0.75, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


# ------------------------------------------------------------------------------------------------
# Detection
# ------------------------------------------------------------------------------------------------


def detection(root: Path, files: Path, machine: Machine, args: argparse.Namespace) -> str:
    """Look at a folder of images and boxes, write them in COCO's format, return the config."""
    from polynext_mm.folders import boxes
    from polynext_mm.folders.files import listed_splits, split_of
    from polynext_mm.folders.splits import alike, split

    print(f'{root}:')
    kind, annotations = boxes.find_format(root)
    pictures, names = boxes.read(root, kind, annotations, args.classes)
    if args.classes:
        others = {box.name for picture in pictures for box in picture.boxes} - set(args.classes)
        if others:
            raise FolderError(
                f'{root} has boxes of {", ".join(sorted(others))}: name all classes with --classes'
            )
        names = args.classes
    say('annotations', f'{kind.upper()}, {len(annotations)} files')
    sizes = [picture.size for picture in pictures]
    say('images', f'{len(pictures)}, {sizes_in_words(sizes)}')
    empty = sum(not picture.boxes for picture in pictures)
    if empty:
        say('', f'{empty} without a box, which teach what is none')
    counted = boxes.count(pictures)
    say('classes', f'{len(names)}')
    for name in names:
        print(f'    {name:<24}{counted[name]:>7} boxes')
    sides: dict[str, list] = {}
    if kind == 'coco' and len(annotations) > 1:
        for path in annotations:
            key = split_of(path.relative_to(root)) or 'train'
            sides.setdefault(key, []).extend(boxes.read(root, kind, [path])[0])
    else:
        listed = listed_splits(root, [picture.path.stem for picture in pictures])
        for picture in pictures:
            key = split_of(picture.path.parent.relative_to(root))
            if listed:
                key = next((k for k, names_ in listed.items() if picture.path.stem in names_), None)
                if key is None:
                    continue
            sides.setdefault(key or 'train', []).append(picture)
    if 'train' not in sides:
        raise nothing_to_train_on(root, sides)
    if 'val' not in sides:
        train = sides['train']
        groups = alike([picture.path for picture in train])
        numbers = {name: i for i, name in enumerate(names)}
        held = {i: {numbers[box.name] for box in picture.boxes} for i, picture in enumerate(train)}
        first, second = split(groups, held, args.seed)
        require_validation(root, second)
        sides |= dict(train=[train[i] for i in first], val=[train[i] for i in second])
        say('split', f'{len(first)} train, {len(second)} val, {told(groups)}')
    else:
        say('split', ', '.join(f'{len(side)} {key}' for key, side in sides.items()))
    files.mkdir(parents=True, exist_ok=True)
    for key, side in sides.items():
        content = boxes.to_coco(side, names, root)
        (files / f'{key}.json').write_text(json.dumps(content), encoding='utf-8')
    say('wrote', f"COCO's format: {files}/{{{','.join(sides)}}}.json")

    long = median(max(size) for size in sizes)
    short = median(min(size) for size in sizes)
    limits = (1333, 800) if machine.memory else (416, 416)
    factor = min(limits[0] / long, limits[1] / short, 1.5)
    scale = tuple(32 * max(1, round(factor * value / 32)) for value in (long, short))
    plan = planned(machine, scale[0] * scale[1], len(sides['train']), args)
    epochs = max(1, round(plan['iterations'] * plan['batch'] / len(sides['train'])))
    say('network', f'{plan["arch"]}, images within {scale[0]}x{scale[1]}, {plan["batch"]} a batch')
    say('schedule', f'{epochs} epochs ({machine.name})')
    return _DETECTION.format(
        command=command_of(args),
        classes=lines_of(names),
        root=f'{root}/',
        files=f'{files}/',
        test='test' if 'test' in sides else 'val',
        scale=scale,
        batch=plan['batch'],
        workers=plan['workers'],
        arch=plan['arch'],
        init=init_of(args),
        clip=clip_of(plan['arch']),
        clip_wrapper=clip_of(plan['arch'], wrapper=True),
        lr=rate_of(args),
        light='' if machine.memory else ', stacked_convs=2, feat_channels=128, in_channels=128',
        light_neck='' if machine.memory else ', out_channels=128',
        epochs=epochs,
        interval=max(1, epochs // 12),
        warmup=plan['warmup'],
        log=plan['log'],
        milestones=[max(1, round(epochs * 2 / 3)), max(1, round(epochs * 11 / 12))],
    )


# ------------------------------------------------------------------------------------------------
# What both share
# ------------------------------------------------------------------------------------------------


def nothing_to_train_on(root: Path, splits: Iterable[str | None]) -> FolderError:
    there = ' and '.join(str(split) for split in splits)
    return FolderError(
        f'{root} has images for {there} and none for train: name the folder of those to train on '
        'train, or give a folder without splits'
    )


def require_validation(root: Path, val: Sequence) -> None:
    if not val:
        raise FolderError(
            f'{root} has a single image, or all look the same, so that none is left to validate '
            'on: put some into a folder called val'
        )


def planned(machine: Machine, pixels: int, number: int, args: argparse.Namespace) -> dict:
    """Return arch, batch size and schedule for a machine and a number of training images."""
    batch = machine.batch_size(pixels, number)
    # each image about 100 times, but no longer than a night on a GPU or ten minutes on a CPU
    least, most = (2000, 40000) if machine.memory else (200, 400)
    iterations = args.iterations or int(min(max(100 * number // batch, least), most))
    return dict(
        arch=args.arch or ('cpolynext_s' if machine.memory else 'cpolynext_t'),
        batch=batch,
        workers=max(1, min(4, (os.cpu_count() or 1) - 1)),
        iterations=iterations,
        interval=max(1, iterations // (20 if machine.memory else 4)),
        warmup=max(1, min(500, iterations // 10)),
        log=max(1, min(50, iterations // 40)),
    )


def median(values) -> int:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def sizes_in_words(sizes: Sequence[tuple[int, int]]) -> str:
    common = Counter(sizes).most_common(1)[0][0]
    if len(set(sizes)) == 1:
        return f'all of {common[0]}x{common[1]}'
    widths, heights = zip(*sizes)
    return f'{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}'


def told(groups: Sequence[Sequence[int]]) -> str:
    together = [group for group in groups if len(group) > 1]
    if not together:
        return 'none of which look the same'
    return f'{sum(map(len, together))} that look the same kept together, in {len(together)} groups'


def lines_of(values: Sequence, brackets: str = '()') -> str:
    """Return a list in one line or several, as ruff would format it."""
    one = ', '.join(map(repr, values)) + (',' if len(values) == 1 else '')
    if len(one) <= 80:
        return brackets[0] + one + brackets[1]
    return brackets[0] + '\n' + ''.join(f'    {value!r},\n' for value in values) + brackets[1]


def command_of(args: argparse.Namespace) -> str:
    return f'polynext-mm new {args.task} {args.folder}'


def init_of(args: argparse.Namespace) -> str:
    if args.from_scratch:
        return "None,  # dict(type='Pretrained', checkpoint=f'polynext://{arch}')"
    return "dict(type='Pretrained', checkpoint=f'polynext://{arch}'),"


def rate_of(args: argparse.Namespace) -> str:
    """Return the learning rate for 16 images: as published, or higher from scratch."""
    return '2e-3' if args.from_scratch else '1e-4'


def heads_of(args: argparse.Namespace) -> str:
    """Return what follows the optimizer: from scratch, heads learn as fast as the backbone."""
    if args.from_scratch:
        return "\noptim_wrapper['paramwise_cfg'] = dict(head_lr_mult=1.0)"
    return '  # times 10 in the heads'


def clip_of(arch: str, wrapper: bool = False) -> str:
    """Return the gradient clips of an A network's recipe: for each cell, or for all parameters."""
    if not arch.startswith('apolynext'):
        return ''
    return ', clip_grad=dict(max_norm=5.0, norm_type=2)' if wrapper else 'grad_clip_norm=5.0, '


_SEGMENTATION = """\
# Written by `{command}`. docs/own_data.md says more.
_base_ = __import__('polynext_mm').config_file('_base_/own_segmentation')

# the data
classes = {classes}
palette = {palette}
dataset = dict(
    data_root={root!r},
    metainfo=dict(classes=classes, palette=palette),
{label_map})
train_set = dict(
    dataset,
{train}
)
val_set = dict(
    dataset,
{val}
){test_loader}
crop_size = ({side}, {side})  # of training; smaller images are padded to it
train_pipeline = _base_.train_pipeline
train_pipeline[3].crop_size = crop_size
batch_size = {batch}  # on each GPU
train_dataloader = dict(
    batch_size=batch_size,
    num_workers={workers},
    dataset=dict(train_set, pipeline=train_pipeline),
)
val_dataloader = dict(num_workers={workers}, dataset=val_set)
test_dataloader = {test_of}

# the network
arch = {arch!r}
widths = __import__('polynext_mm').widths(arch)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=arch,
        {clip}init_cfg={init}
    ),
    decode_head=dict(in_channels=widths, num_classes=len(classes){light}),
    auxiliary_head=dict(in_channels=widths[2], num_classes=len(classes)),
{slide})

# the schedule
max_iters = {iterations}
optim_wrapper = dict(optimizer=dict(lr={lr} * batch_size / 16){clip_wrapper}){heads}
auto_scale_lr = dict(base_batch_size=batch_size)  # --auto-scale-lr: for more GPUs
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end={warmup}),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval={interval})
default_hooks = dict(
    logger=dict(interval={log}),
    checkpoint=dict(interval={interval}),  # keeps the best and the last three
)
"""

_DETECTION = """\
# Written by `{command}`. docs/own_data.md says more.
_base_ = __import__('polynext_mm').config_file('_base_/own_detection')

# the data
classes = {classes}
data_root = {root!r}  # of the images
annotations = {files!r}
train_file, val_file = annotations + 'train.json', annotations + 'val.json'
test_file = annotations + '{test}.json'
scale = {scale}  # images are resized to fit into it
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = scale
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0][0].scale = scale
batch_size = {batch}  # on each GPU
dataset = dict(data_root=data_root, data_prefix=dict(img=''), metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    num_workers={workers},
    dataset=dict(dataset, ann_file=train_file, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers={workers}, dataset=dict(dataset, ann_file=val_file, pipeline=test_pipeline)
)
test_dataloader = dict(
    num_workers={workers}, dataset=dict(dataset, ann_file=test_file, pipeline=test_pipeline)
)
val_evaluator = dict(ann_file=val_file)
test_evaluator = dict(ann_file=test_file)

# the network
arch = {arch!r}
model = dict(
    backbone=dict(
        arch=arch,
        {clip}init_cfg={init}
    ),
    neck=dict(in_channels=__import__('polynext_mm').widths(arch)[1:]{light_neck}),
    bbox_head=dict(num_classes=len(classes){light}),
)

# the schedule
max_epochs = {epochs}
optim_wrapper = dict(optimizer=dict(lr={lr} * batch_size / 16){clip_wrapper})
auto_scale_lr = dict(base_batch_size=batch_size)  # --auto-scale-lr: for more GPUs
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end={warmup}),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones={milestones}),
]
train_cfg = dict(max_epochs=max_epochs, val_interval={interval})
default_hooks = dict(logger=dict(interval={log}))
"""
