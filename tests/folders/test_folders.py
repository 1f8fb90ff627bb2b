"""What a folder of images and annotations is taken for, by `new` and `convert-dataset`."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image, ImageEnhance

from polynext_mm.commands import main
from polynext_mm.commands.new import Machine
from polynext_mm.engine.checks.config import check_config
from polynext_mm.folders import FolderError, boxes, masks
from polynext_mm.folders.files import split_of
from polynext_mm.folders.pairs import find_pairs
from polynext_mm.folders.splits import alike, split

SIZE = (80, 64)
COLOURS = np.array([(0, 0, 0), (128, 64, 128), (0, 128, 0)], np.uint8)


def photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shades = Image.fromarray(rng.integers(40, 216, (6, 7, 3), dtype=np.uint8))
    pixels = np.asarray(shades.resize(SIZE, Image.BICUBIC)) + rng.integers(0, 9, (*SIZE[::-1], 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def label(path: Path, values=(0, 1, 2), colours=None) -> Path:
    """Write stripes of values, or of the colours of these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array(values, np.uint8), -(-SIZE[1] // len(values)))[: SIZE[1], None]
    pixels = np.broadcast_to(stripes, SIZE[::-1])
    Image.fromarray(np.ascontiguousarray(pixels if colours is None else colours[pixels])).save(path)
    return path


def pairs_in(folder: Path, images: str, labels: str, count=6, first=0, **options) -> None:
    """Write images and labels; {} is a number in the names."""
    for index in range(first, first + count):
        photo(folder / images.format(index), index)
        label(folder / labels.format(index), **options)


# Images and labels


@pytest.mark.parametrize(
    ('images', 'labels', 'suffixes'),
    [
        ('photos/{}.jpg', 'masks/{}.png', ('.jpg', '.png')),
        ('photos/{}.png', 'masks/{}_mask.png', ('.png', '_mask.png')),
        ('{}.jpg', '{}.png', ('.jpg', '.png')),
        ('a{}.png', 'a{}_labelIds.png', ('.png', '_labelIds.png')),
    ],
)
def test_images_and_labels_are_told_apart(images, labels, suffixes, tmp_path):
    pairs_in(tmp_path, images, labels)
    photo(tmp_path / images.format(99), 99)  # which nobody has labelled
    (pairs,) = find_pairs(tmp_path).values()
    assert (pairs.image_suffix, pairs.label_suffix) == suffixes
    assert len(pairs.names) == 6 and pairs.unlabelled == 1
    assert all(path.is_file() for path in pairs.image_paths(tmp_path))
    assert all(path.is_file() for path in pairs.label_paths(tmp_path))


@pytest.mark.parametrize('split_last', [True, False])
def test_splits_are_those_of_the_folders(split_last, tmp_path):
    for name, count in (('train', 5), ('val', 3)):
        places = [f'{kind}/{name}' if split_last else f'{name}/{kind}' for kind in ('img', 'gt')]
        pairs_in(tmp_path, f'{places[0]}/{{}}.jpg', f'{places[1]}/{{}}.png', count)
    found = find_pairs(tmp_path)
    assert {key: len(pairs.names) for key, pairs in found.items()} == dict(train=5, val=3)


def test_names_have_the_folders_of_scenes(tmp_path):
    for scene in ('a', 'b'):
        pairs_in(tmp_path, f'images/{scene}/{{}}.jpg', f'labels/{scene}/{{}}.png', 3)
    (pairs,) = find_pairs(tmp_path).values()
    assert pairs.names == [f'{scene}/{index}' for scene in 'ab' for index in range(3)]
    assert pairs.images == Path('images')


def test_photos_alone_are_told(tmp_path):
    for index in range(3):
        photo(tmp_path / 'a' / f'{index}.jpg', index)
        photo(tmp_path / 'b' / f'{index}.jpg', index + 3)
    with pytest.raises(FolderError, match=r'no images with label images of the same name'):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ('path', 'expected'),
    [('val2017/1.jpg', 'val'), ('a/training/b', 'train'), ('trainer/1', None), ('x/y', None)],
)
def test_split_names(path, expected):
    assert split_of(Path(path)) == expected


# Splits


def test_images_that_are_alike_stay_together(tmp_path):
    paths = []
    for index in range(6):
        paths.append(photo(tmp_path / f'{index}_a.png', index))
        with Image.open(paths[-1]) as image:
            brighter = ImageEnhance.Brightness(image).enhance(0.9).resize((120, 96))
        paths.append(tmp_path / f'{index}_b.jpg')
        brighter.save(paths[-1], quality=80)
    groups = alike(paths)
    assert sorted(map(sorted, groups)) == [[2 * i, 2 * i + 1] for i in range(6)]
    train, val = split(groups, {i: {i // 6} for i in range(12)})
    assert sorted(train + val) == list(range(12)) and val
    assert {i // 2 for i in train}.isdisjoint(i // 2 for i in val)
    assert (train, val) == split(groups, {i: {i // 6} for i in range(12)})
    assert any(split(groups, {}, seed)[1] != val for seed in range(1, 5))


def test_rare_classes_are_on_both_sides():
    classes = {i: {0, 1} if i in (3, 7) else {0} for i in range(20)}
    train, val = split([[i] for i in range(20)], classes)
    assert len(val) == 4 and len({3, 7} & set(val)) == 1


def test_one_group_is_not_divided():
    assert split([[0, 1, 2]], {}) == ([0, 1, 2], [])


# Colours


@pytest.mark.parametrize(
    'text',
    [
        '# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n',
        '0 0 0 background\n128 64 128\troad\n',
        'name,r,g,b\nbackground,0,0,0\nroad,128,64,128\n',
    ],
)
def test_tables_of_colours(text):
    table = masks.parse_colours(text)
    assert table == [('background', (0, 0, 0)), ('road', (128, 64, 128))]


def test_masks_become_ids(tmp_path, capsys):
    for index, values in enumerate([(0, 1), (0, 2), (0, 0)]):
        label(tmp_path / 'masks' / f'{index}.png', values, COLOURS)
    arguments = ['convert-dataset', 'masks', str(tmp_path / 'masks'), str(tmp_path / 'ids')]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert '2  colour_804080 (128, 64, 128)' in printed  # in the order of colours
    for index, values in enumerate([[0, 2], [0, 1], [0]]):
        assert (
            np.unique(np.asarray(Image.open(tmp_path / 'ids' / f'{index}.png'))).tolist() == values
        )
    with pytest.raises(SystemExit, match='--force'):
        main(arguments)
    table = tmp_path / 'table.txt'
    table.write_text('0 0 0 background\n128 64 128 road\n')
    with pytest.raises(SystemExit, match=r'1\.png has values that are no class: \(0, 128, 0\)'):
        main([*arguments, '--force', '--colours', str(table)])


# Boxes


def voc(path: Path, name: str, difficult: int = 0) -> None:
    path.write_text(
        f'<annotation><filename>{name}</filename><object><name>cat</name>'
        f'<difficult>{difficult}</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax>'
        '<ymax>40</ymax></bndbox></object></annotation>'
    )


def test_voc(tmp_path):
    photo(tmp_path / 'JPEGImages' / '1.jpg', 0)
    photo(tmp_path / 'JPEGImages' / '2.jpg', 1)
    (tmp_path / 'Annotations').mkdir()
    voc(tmp_path / 'Annotations' / '1.xml', '1.jpg', difficult=1)
    content = converted(tmp_path)
    assert [entry['file_name'] for entry in content['images']] == [
        'JPEGImages/1.jpg',
        'JPEGImages/2.jpg',
    ]
    (entry,) = content['annotations']
    assert entry['bbox'] == [10, 20, 20, 20] and entry['iscrowd'] == 1
    assert content['categories'] == [dict(id=1, name='cat')]


def converted(folder: Path) -> dict:
    out = folder.parent / 'out.json'
    assert main(['convert-dataset', 'boxes', str(folder), str(out), '--force']) == 0
    return json.loads(out.read_text())


def test_yolo_with_equal_names_in_both_splits(tmp_path):
    for part, x in (('train', 0.25), ('val', 0.75)):
        photo(tmp_path / 'images' / part / '1.jpg', 0)
        (tmp_path / 'labels' / part).mkdir(parents=True)
        (tmp_path / 'labels' / part / '1.txt').write_text(f'1 {x} 0.5 0.25 0.5\n')
    (tmp_path / 'data.yaml').write_text('names: {0: cat, 1: dog}\n')
    content = converted(tmp_path)
    found = {entry['image_id']: entry['bbox'] for entry in content['annotations']}
    names = {entry['id']: entry['file_name'] for entry in content['images']}
    assert {names[key]: box for key, box in found.items()} == {
        'images/train/1.jpg': [10, 16, 20, 32],
        'images/val/1.jpg': [50, 16, 20, 32],
    }
    assert [entry['name'] for entry in content['categories']] == ['cat', 'dog']


def test_labelme_as_boxes_and_as_ids(tmp_path):
    folder = tmp_path / 'leaves'
    photo(folder / '1.jpg', 0)
    shapes = [
        dict(label='leaf', points=[[10, 10], [50, 10], [50, 40]], shape_type='polygon'),
        dict(label='stone', points=[[60, 50], [70, 60]], shape_type='rectangle'),
    ]
    (folder / '1.json').write_text(json.dumps(dict(imagePath='1.jpg', shapes=shapes)))
    content = converted(folder)
    assert [entry['bbox'] for entry in content['annotations']] == [
        [10, 10, 40, 30],
        [60, 50, 10, 10],
    ]
    assert content['annotations'][0]['segmentation'] == [[10, 10, 50, 10, 50, 40]]
    assert main(['convert-dataset', 'polygons', str(folder), str(tmp_path / 'ids')]) == 0
    ids = np.asarray(Image.open(tmp_path / 'ids' / '1.png'))
    assert ids.shape == SIZE[::-1]
    assert (ids[0, 0], ids[15, 45], ids[55, 65]) == (0, 1, 2)


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('1.txt', '0 0.5 0.5\n', r'1\.txt, line 1: 2 numbers are no box'),
        ('1.txt', 'cat 0.5 0.5 0.1 0.1\n', r"1\.txt, line 1: not a class and its box.*'cat 0\.5"),
        (
            '2.xml',
            '<annotation><filename>2.jpg</filename></annotation>',
            r'there is no image 2\.jpg',
        ),
        ('1.json', '{"shapes": [', r'1\.json is no JSON file'),
        ('3.txt', '', 'one format of annotations is needed'),
    ],
)
def test_what_cannot_be_read_is_named(file, content, message, tmp_path):
    photo(tmp_path / '1.jpg', 0)
    (tmp_path / file).write_text(content)
    with pytest.raises(FolderError, match=message):
        kind, files = boxes.find_format(tmp_path)
        boxes.read(tmp_path, kind, files)


# Configs


@pytest.mark.parametrize(
    ('memory', 'pixels', 'number', 'batch'),
    [
        (None, 512**2, 1000, 4),
        (24, 512**2, 1000, 8),
        (80, 512**2, 1000, 16),
        (8, 512**2, 1000, 2),
        (80, 512**2, 20, 4),
        (80, 512**2, 3, 2),
    ],
)
def test_batches_fit_the_machine_and_the_data(memory, pixels, number, batch):
    assert Machine('any', memory).batch_size(pixels, number) == batch


@pytest.fixture(params=[None, 80.0], ids=['cpu', 'gpu'])
def machine(request, monkeypatch):
    monkeypatch.setattr(Machine, 'this', classmethod(lambda cls: cls('any', request.param)))
    return request.param


@pytest.mark.parametrize('kind', ['ids', 'colours', 'binary', 'splits', 'gaps'])
def test_a_config_for_segmentation(kind, tmp_path, monkeypatch, capsys, machine):
    folder = tmp_path / 'my roofs'
    options = dict(
        colours=dict(colours=COLOURS), binary=dict(values=(0, 255)), gaps=dict(values=(0, 7, 30))
    ).get(kind, {})
    if kind == 'splits':
        pairs_in(folder, 'images/train/{}.jpg', 'labels/train/{}.png', 8)
        pairs_in(folder, 'images/val/{}.jpg', 'labels/val/{}.png', 4, 8)
    else:
        pairs_in(folder, 'images/{}.jpg', 'labels/{}.png', 10, **options)
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob('*'))
    assert main(['new', 'segmentation', str(folder)]) == 0
    assert 'next: polynext-mm check-dataset my_roofs.py' in capsys.readouterr().out
    assert sorted(folder.rglob('*')) == before
    cfg = Config.fromfile('my_roofs.py')
    check_config(cfg)
    assert len(cfg.classes) == len(cfg.palette) == (2 if kind == 'binary' else 3)
    assert cfg.model.backbone.arch == ('cpolynext_s' if machine else 'cpolynext_t')
    train, val = (cfg[f'{key}_dataloader'].dataset for key in ('train', 'val'))
    assert train.get('label_map') == dict(binary={0: 0, 255: 1}, gaps={0: 0, 7: 1, 30: 2}).get(kind)
    for settings, count in ((train, 8), (val, 4 if kind == 'splits' else 2)):
        names = (
            Path(settings.ann_file).read_text().split()
            if 'ann_file' in settings
            else [path.stem for path in (folder / settings.data_prefix.img_path).iterdir()]
        )
        assert len(names) == count
        for name in names:
            path = folder / settings.data_prefix.seg_map_path / (name + settings.seg_map_suffix)
            assert np.asarray(Image.open(path)).ndim == 2
    with pytest.raises(SystemExit, match='--out'):
        main(['new', 'segmentation', str(folder)])


def test_classes_are_named_by_a_file_or_by_the_user(tmp_path, monkeypatch):
    folder = tmp_path / 'roofs'
    pairs_in(folder, 'images/{}.jpg', 'labels/{}.png')
    (folder / 'classes.txt').write_text('ground\nroad\nroof\ntree\n')
    monkeypatch.chdir(tmp_path)
    assert main(['new', 'segmentation', 'roofs']) == 0
    assert Config.fromfile('roofs.py').classes == ('ground', 'road', 'roof', 'tree')
    assert main(['new', 'segmentation', 'roofs', '--force', '--classes', 'a', 'b', 'c']) == 0
    assert Config.fromfile('roofs.py').classes == ('a', 'b', 'c')
    with pytest.raises(SystemExit, match='2 names of classes were given, and the labels hold 3'):
        main(['new', 'segmentation', 'roofs', '--force', '--classes', 'a', 'b'])


@pytest.mark.parametrize('arch', ['cpolynext_t', 'apolynext_t'])
def test_a_config_for_detection(arch, tmp_path, monkeypatch, machine):
    folder = tmp_path / 'cats'
    for index in range(10):
        photo(folder / 'images' / f'{index}.jpg', index)
    (folder / 'xml').mkdir()
    for index in range(9):
        voc(folder / 'xml' / f'{index}.xml', f'{index}.jpg')
    monkeypatch.chdir(tmp_path)
    assert main(['new', 'detection', 'cats', '--arch', arch, '--from-scratch']) == 0
    cfg = Config.fromfile('cats.py')
    check_config(cfg)
    assert cfg.classes == ('cat',) and cfg.model.backbone.init_cfg is None
    assert ('grad_clip_norm' in cfg.model.backbone) == (arch == 'apolynext_t')
    parts = [json.loads(Path(cfg[name]).read_text()) for name in ('train_file', 'val_file')]
    assert [len(part['images']) for part in parts] == [8, 2]
    assert all((folder / entry['file_name']).is_file() for p in parts for entry in p['images'])
    assert cfg.val_evaluator.ann_file == cfg.val_file
    init_default_scope('mmdet')
    for split_, count in (('train', 8), ('val', 2)):
        dataset = DATASETS.build(cfg[f'{split_}_dataloader'].dataset)
        assert len(dataset) == count
        assert dataset[0]['inputs'].shape[0] == 3
