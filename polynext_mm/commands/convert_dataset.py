"""Convert annotations to what mm reads: ``polynext-mm convert-dataset KIND FOLDER OUT``.

Boxes (VOC, YOLO, LabelMe) and polygons become a file in COCO's format; label images that hold
colours, or 0 and 255, and polygons of LabelMe or COCO become label images with ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm convert-dataset',
        description="Convert annotations to COCO's format, or to label images with ids. The folder "
        'itself stays as it is',
        epilog='for example: polynext-mm convert-dataset boxes /data/cells cells.json\n'
        '             polynext-mm convert-dataset masks /data/roofs/masks ids --colours t.txt\n'
        '             polynext-mm convert-dataset polygons /data/leaves ids',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'kind',
        choices=['boxes', 'masks', 'polygons'],
        help="boxes: VOC, YOLO or LabelMe to COCO's format; masks: colours, or 0 and 255, to ids; "
        'polygons: LabelMe, YOLO or COCO to label images with ids, where 0 is background',
    )
    parser.add_argument('folder', type=Path, help='of the annotations and their images')
    parser.add_argument('out', type=Path, help='a .json file for boxes, else a folder')
    parser.add_argument(
        '--colours',
        type=Path,
        metavar='FILE',
        help='of masks: a name, red, green and blue in each line, in the order of the ids '
        '(default: labelmap.txt and the like in the folder, or all colours that occur)',
    )
    parser.add_argument('--force', action='store_true', help='write into OUT if it exists')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    from polynext_mm.folders import FolderError

    if not args.folder.is_dir():
        parser.error(f'there is no folder {args.folder}')
    if args.kind == 'boxes' and args.out.suffix != '.json':
        parser.error(f'boxes are written to a .json file, got {args.out}')
    if args.out.exists() and not args.force:
        sys.exit(f'{args.out} exists: use --force to write into it')
    try:
        dict(boxes=boxes, masks=masks, polygons=polygons)[args.kind](args)
    except (FolderError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    return 0


def boxes(args: argparse.Namespace) -> None:
    from polynext_mm.folders import boxes as formats

    kind, files = formats.find_format(args.folder)
    pictures, names = formats.read(args.folder, kind, files)
    counted = formats.count(pictures)
    for name in names:
        print(f'{name:<28}{counted[name]:>8} boxes')
    content = formats.to_coco(pictures, names, args.folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content), encoding='utf-8')
    print(f'wrote {args.out}: {len(pictures)} images, from {kind.upper()}')


def masks(args: argparse.Namespace) -> None:
    from polynext_mm.folders import FolderError
    from polynext_mm.folders import masks as labels
    from polynext_mm.folders.files import images_below

    paths = images_below(args.folder)
    values = labels.count_values(paths)
    if not values.coloured:
        if args.colours:
            raise FolderError(f'the labels in {args.folder} have one channel, and no colours')
        _, ids = labels.numbered(values)
        names = {value: f'value {value}' for value in ids}
    else:
        found = labels.colour_table(args.folder)
        table = found[1] if found else None
        if args.colours:
            table = labels.parse_colours(args.colours.read_text(encoding='utf-8-sig'))
            if not table:
                raise FolderError(f'{args.colours}: no line has a name and three numbers')
        classes = labels.named_colours(values, table)
        ids = {(r << 16) | (g << 8) | b: i for i, (_, (r, g, b)) in enumerate(classes)}
        names = {
            value: f'{classes[index].name} {classes[index].rgb}' for value, index in ids.items()
        }
    total = sum(values.pixels.values())
    for value in values.pixels.keys() - ids.keys():
        names[value] = f'{labels.unpacked(value)}'
    for value in sorted(names, key=lambda value: ids.get(value, 256)):
        shown = ids.get(value, 'no class')
        share, images = values.pixels[value] / total, values.images[value]
        print(f'{shown!s:>8}  {names[value]:<40}{share:>9.3%}{images:>8} images')
    for path in paths:
        target = args.out / path.relative_to(args.folder).with_suffix('.png')
        labels.write_ids(path, target, ids, values.coloured)
    print(f'wrote {len(paths)} label images to {args.out}')


def polygons(args: argparse.Namespace) -> None:
    from polynext_mm.folders import boxes as formats

    kind, files = formats.find_format(args.folder)
    pictures, names = formats.read(args.folder, kind, files)
    ids = {name: index for index, name in enumerate(names, 1)}
    counted = formats.count(pictures)
    print(f'{0:>8}  background')
    for name, index in ids.items():
        print(f'{index:>8}  {name:<28}{counted[name]:>8} polygons')
    for picture in pictures:
        target = args.out / picture.path.relative_to(args.folder).with_suffix('.png')
        target.parent.mkdir(parents=True, exist_ok=True)
        formats.draw_ids(picture, ids).save(target)
    print(f'wrote {len(pictures)} label images to {args.out}, from {kind.upper()}')
