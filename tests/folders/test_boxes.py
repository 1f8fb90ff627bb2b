"""Which image an annotation belongs to, and what is refused in files of boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polynext_mm.commands import main
from polynext_mm.folders import FolderError, boxes

SIZE = (80, 64)
BOX = dict(id=1, image_id=1, category_id=1, bbox=[10, 20, 30, 40])
OUTLINES = [[1, 1, 9, 1, 9, 9], [20, 20, 30, 20, 30, 30]]
YOLO = '0 0.5 0.5 0.25 0.5\n'


def write(folder: Path, *images: str, **files: object) -> Path:
    """Write grey images, and files whose names have __ for a dot and _in_ for a slash."""
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', SIZE).save(folder / name)
    for name, content in files.items():
        path = folder / name.replace('_in_', '/').replace('__', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding='utf-8')
    return folder


def coco(name='1.jpg', box=BOX, **image) -> dict:
    return dict(
        images=[dict(dict(id=1, file_name=name, width=80, height=64), **image)],
        annotations=[box],
        categories=[dict(id=1, name='cat')],
    )


def read(folder: Path, **options):
    return boxes.read(folder, *boxes.find_format(folder), **options)


def labelme(name: str, *shapes: tuple) -> dict:
    keys = ('shape_type', 'points')
    return dict(imagePath=name, shapes=[dict(zip(keys, shape), label='cat') for shape in shapes])


# Which image is meant


@pytest.mark.parametrize(
    ('images', 'file', 'name', 'expected'),
    [
        (('depth/1.jpg', 'images/1.jpg'), 'ann__json', '1.jpg', 'images/1.jpg'),
        (('a/train/1.jpg', 'a/val/1.jpg'), 'x_in_val__json', '1.jpg', 'a/val/1.jpg'),
        (('a/train/1.jpg', 'b/val/1.jpg'), 'b_in_train__json', '1.jpg', 'a/train/1.jpg'),
        (('a/1.jpg', 'b/1.jpg'), 'ann__json', 'C:\\data\\b\\1.jpg', 'b/1.jpg'),
        (
            ('images/1.jpg', 'labels/2.jpg'),
            'labels_in_a__json',
            '..\\images\\1.jpg',
            'images/1.jpg',
        ),
    ],
)
@pytest.mark.parametrize('relative', [False, True])
def test_the_image_that_is_meant(images, file, name, expected, relative, tmp_path, monkeypatch):
    write(tmp_path / 'set', *images, **{file: coco(name)})
    monkeypatch.chdir(tmp_path)
    root = Path('set') if relative else tmp_path / 'set'
    pictures = [picture for picture in read(root)[0] if picture.boxes]
    (image,) = boxes.to_coco(pictures, ['cat'], root)['images']
    assert image['file_name'] == expected


def test_images_that_cannot_be_told_apart(tmp_path):
    write(tmp_path, 'a/1.jpg', 'b/1.jpg', ann__json=coco())
    with pytest.raises(FolderError, match=r'ann\.json: .*a/1\.jpg or .*b/1\.jpg: .*file_name'):
        read(tmp_path)


@pytest.mark.parametrize('content', [coco('../1.jpg'), labelme('..\\1.jpg')])
def test_an_image_outside_of_the_folder(content, tmp_path):
    write(tmp_path, '1.jpg', set_in_a__json=content)
    with pytest.raises(FolderError, match=r'a\.json: the image .*1\.jpg is not below'):
        read(tmp_path / 'set')


# COCO


@pytest.mark.parametrize('size', [dict(width=0), dict(width=None, height=None)])
def test_a_missing_size_is_that_of_the_image(size, tmp_path):
    write(tmp_path, '1.jpg', a__json=coco(**size))
    assert read(tmp_path)[0][0].size == SIZE


@pytest.mark.parametrize('image_id', ['1', 1.0])
def test_ids_are_equal_as_text(image_id, tmp_path):
    write(tmp_path, '1.jpg', a__json=coco(box=dict(BOX, image_id=image_id, category_id='1')))
    (box,) = read(tmp_path)[0][0].boxes
    assert box == boxes.Box('cat', (10, 20, 30, 40), [])


def test_several_outlines_are_one_object(tmp_path):
    box = {key: value for key, value in BOX.items() if key != 'bbox'}
    folder = write(tmp_path / 'set', '1.jpg', a__json=coco(box=dict(box, segmentation=OUTLINES)))
    pictures, names = read(folder)
    (entry,) = boxes.to_coco(pictures, names, folder)['annotations']
    assert entry['segmentation'] == OUTLINES and entry['bbox'] == [1, 1, 29, 29]
    assert main(['convert-dataset', 'polygons', str(folder), str(tmp_path / 'ids')]) == 0
    ids = np.asarray(Image.open(tmp_path / 'ids' / '1.png'))
    assert (ids[3, 8], ids[22, 28], ids[15, 15]) == (1, 1, 0)


def test_masks_as_rle_are_not_drawn(tmp_path):
    rle = dict(counts=[5, 5115], size=[64, 80])
    write(tmp_path, '1.jpg', a__json=coco(box=dict(BOX, segmentation=rle)))
    (picture,) = read(tmp_path)[0]
    with pytest.raises(FolderError, match=r'1\.jpg has a cat without a polygon: .*RLE'):
        boxes.draw_ids(picture, dict(cat=1))


# LabelMe


def test_points_and_lines_are_left_out(tmp_path):
    shapes = ('point', [[4, 4]]), ('linestrip', [[4, 4], [5, 5]]), ('rectangle', [[1, 2], [5, 9]])
    write(tmp_path, '1.jpg', a__json=labelme('1.jpg', *shapes))
    assert [box.box for box in read(tmp_path)[0][0].boxes] == [(1, 2, 4, 7)]


# YOLO


@pytest.mark.parametrize('stray', [dict(log__json='{}\n{}'), dict(log__json=''), {}])
def test_yolo_with_a_byte_order_mark_and_other_files(stray, tmp_path):
    write(tmp_path, '1.jpg', **{'1__txt': '\ufeff' + YOLO}, **stray)
    pictures, names = read(tmp_path)
    assert names == ['class_000'] and pictures[0].boxes[0].box == (30, 16, 20, 32)
    pictures, names = read(tmp_path, classes=['cat', 'dog'])
    assert names == ['cat', 'dog'] and pictures[0].boxes[0].name == 'cat'
    with pytest.raises(FolderError, match=r"1\.jpg has a box of 'cat', which is none"):
        boxes.to_coco(pictures, ['cow'], tmp_path)


def test_keys_of_names_are_numbers(tmp_path):
    names = {str(index): f'n{index}' for index in range(11) if index != 1}
    write(tmp_path, '1.jpg', **{'1__txt': '10' + YOLO[1:]}, data__yaml=dict(names=names))
    pictures, found = read(tmp_path)
    assert found[:3] == ['n0', 'class_001', 'n2'] and pictures[0].boxes[0].name == 'n10'


# What is refused


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        (dict(a__json=coco(box=dict(BOX, bbox=[]))), r'a\.json: annotation 1 has no bbox'),
        (dict(a__json=coco(box=dict(BOX, bbox=None))), r'a\.json: annotation 1 has no bbox'),
        (dict(a__json=coco(box=dict(BOX, category_id=9))), r'category_id 9, .* 1 categories'),
        (dict(a__json=coco(box=dict(id=1, image_id=1, caption='x'))), 'no category_id: .*captions'),
        (dict(a__json=coco(box=dict(BOX, image_id=7))), 'no image has the image_id .* 7'),
        (dict(a__json=coco(name=None)), r"a\.json is not in COCO's format"),
        (dict(a__json=dict(imagePath='1.jpg', shapes=[3])), r"a\.json is not in LabelMe's format"),
        ({'1__txt': '-1 0.5 0.5 0.1 0.1'}, r'1\.txt, line 1: not a class'),
        ({'1__txt': '0 nan 0.5 0.1 0.1'}, r'1\.txt, line 1: not a class'),
        ({'1__txt': YOLO, 'data__yaml': '- a\n- b\n'}, r'data\.yaml has no keys'),
        ({'1__txt': YOLO, 'data__yaml': 'names: ['}, r'data\.yaml is no YAML file'),
        ({'1__txt': YOLO, 'data__yaml': 'names: {a: b}'}, r'data\.yaml: the keys of names'),
        ({'1__txt': YOLO, 'data__yaml': 'kpt_shape: [4, 3]'}, r'data\.yaml has a kpt_shape'),
    ],
)
def test_what_is_refused(files, message, tmp_path):
    write(tmp_path, '1.jpg', **files)
    with pytest.raises(FolderError, match=message) as raised:
        read(tmp_path)
    assert '\n' not in str(raised.value)


def test_classes_of_the_command_line_name_those_of_yolo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [f'images_{i}.jpg' for i in range(4)]
    write(tmp_path / 'cells', *images, **{f'images_{i}__txt': YOLO for i in range(4)})
    for index, name in enumerate(images):  # images that do not look the same
        noise = np.random.default_rng(index).integers(0, 255, (64, 80), np.uint8)
        Image.fromarray(noise).save(tmp_path / 'cells' / name)
    assert main(['new', 'detection', 'cells', '--classes', 'cat', 'dog']) == 0
    content = json.loads(Path('cells_files/train.json').read_text())
    assert [category['name'] for category in content['categories']] == ['cat', 'dog']
    write(tmp_path / 'named', *images, a__json=coco(images[0]))
    with pytest.raises(SystemExit, match='boxes of cat: name all classes'):
        main(['new', 'detection', 'named', '--classes', 'dog'])


def test_of_coco_itself_the_instances_are_read(tmp_path):
    other = dict(coco(), categories=[dict(id=1, name='person')])
    folder = write(
        tmp_path,
        '1.jpg',
        annotations_in_instances_val__json=coco(),
        annotations_in_person_keypoints_val__json=other,
        annotations_in_captions_val__json=dict(coco(), categories=[]),
    )
    pictures, names = read(folder)
    assert names == ['cat'] and len(pictures) == 1


def test_names_of_yolo_beside_its_labels(tmp_path):
    folder = write(tmp_path, 'images/1.jpg', labels_in_1__txt=YOLO, labels_in_classes__txt='cat\n')
    assert read(folder)[1] == ['cat']
