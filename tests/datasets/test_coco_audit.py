"""Annotation files in COCO's format: what mmdet would leave out without a word."""

import json
import re

import pytest

from polynext_mm.datasets import DataError, audit_coco
from polynext_mm.engine.checks.coco import read_coco
from tests.coco_sample import make_coco

CLASSES = ('box', 'ball', 'tent')


@pytest.fixture
def path(tmp_path):
    root = make_coco(tmp_path, CLASSES, train=12)
    return root / 'annotations' / 'instances_train2017.json'


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def audited(path, classes=CLASSES, **settings):
    return audit_coco(path, classes, path.parents[1] / 'train2017', **settings)


def serious(audit) -> str:
    return '\n'.join(str(finding) for finding in audit.findings if finding.serious)


def notes(audit) -> str:
    return '\n'.join(str(finding) for finding in audit.findings if not finding.serious)


def each(content, change):
    for annotation in content['annotations']:
        change(annotation)


def test_a_sound_file_is_counted(path):
    audit = audited(path, with_mask=True)
    content = json.loads(path.read_text())
    assert not audit.findings
    assert audit.images == 12 and audit.boxes == len(content['annotations'])
    assert sum(audit.usable.values()) == audit.boxes
    for number, name in enumerate(CLASSES, start=1):
        ours = [a for a in content['annotations'] if a['category_id'] == number]
        assert audit.usable[name] == len(ours)
        assert audit.with_class[name] == len({a['image_id'] for a in ours})


def as_corners(annotation):
    x, y, width, height = annotation['bbox']
    annotation['bbox'] = [x, y, x + width, y + height]


def as_fractions(annotation):
    annotation['bbox'] = [value / 128 for value in annotation['bbox']]


def negative(annotation):
    annotation['bbox'][2] *= -1


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda c: each(c, as_corners), 'look like x1, y1, x2, y2 .*subtract the first corner'),
        (lambda c: each(c, as_fractions), 'look like fractions of the image: multiply'),
        (
            lambda c: negative(c['annotations'][0]),
            r'1 of \d+ boxes have no or negative width or height \(annotations 1\)',
        ),
        (
            lambda c: c['annotations'][0]['bbox'].__setitem__(3, 0),
            r'1 of \d+ boxes have no or negative width or height \(annotations 1\)',
        ),
        (
            lambda c: c['annotations'][0].update(category_id=99),
            r'1 of \d+ annotations name a category that the file does not list \(99\)',
        ),
        (
            lambda c: each(c, lambda a: a.update(image_id=a['image_id'] + 1000)),
            r'\d+ of \d+ annotations name an image that the file does not list .*of other images',
        ),
        (
            lambda c: [i.update(file_name='other_' + i['file_name']) for i in c['images']],
            r'12 of its 12 images are not in .*train2017, which has 12 files \(e.g. '
            r'.*other_001.png\)',
        ),
        (lambda c: c['annotations'][1].update(id=1), 'ids of annotations occur more than once'),
        (lambda c: c['categories'][1].update(id=1), 'ids of categories occur more than once'),
        (
            lambda c: c['images'][1].update(file_name=c['images'][0]['file_name']),
            r'1 files are listed as several images \(001.png\), and each is trained without',
        ),
        (
            lambda c: c['images'][1].update(file_name=f'./{c["images"][0]["file_name"]}'),
            r'1 files are listed as several images \(001.png\), and each is trained without',
        ),
        (
            lambda c: c['annotations'][0].update(segmentation=[[1, 1, 9, 9]]),
            r'1 of \d+ annotations have a segmentation that is neither .* \(ids 1\)',
        ),
        (
            lambda c: c['annotations'][0].update(segmentation=[[[1, 1], [9, 1], [9, 9]]]),
            r'1 of \d+ annotations have a segmentation that is neither .* \(ids 1\)',
        ),
        (
            lambda c: c['annotations'][1]['segmentation'].update(size=[64, 128]),
            r'1 of \d+ annotations have run lengths of another size .* \(ids 2\)',
        ),
        (
            lambda c: each(c, lambda a: a.update(category_id=str(a['category_id']))),
            r"name a category that the file does not list \('\d', ",
        ),
        (lambda c: c['images'].clear(), 'lists no images'),
        (lambda c: c['annotations'].clear(), r'of 0 boxes none can be used for the 3 classes'),
        (
            lambda c: c['annotations'][0].pop('segmentation'),
            'have no segmentation .ids 1.: train boxes alone',
        ),
        (
            lambda c: c['annotations'][0]['bbox'].__setitem__(0, float('nan')),
            'have a number that is not finite',
        ),
    ],
    ids=[
        'corners',
        'fractions',
        'negative',
        'zero',
        'unknown category',
        'unknown image',
        'other images',
        'repeated id',
        'repeated category',
        'a file under two ids',
        'a file under two names',
        'two points',
        'nested points',
        'run lengths of another size',
        'text for a number',
        'no images',
        'no boxes',
        'no masks',
        'nan',
    ],
)
def test_what_is_wrong_is_told(path, change, told):
    message = serious(audited(changed(path, change), with_mask=True))
    assert re.search(told, message), message
    assert str(path) in message


def test_corners_are_told_from_extents_by_a_few_boxes_too(path):
    def few(content):
        del content['annotations'][4:]
        each(content, as_corners)

    assert 'look like x1' in serious(audited(changed(path, few)))


def test_a_class_in_other_letters_is_told_with_the_right_ones(path):
    message = serious(audited(path, ('Box', 'ball', 'tent ')))
    assert "class 'Box' is not among its categories (box, ball, tent): write it as" in message
    assert "as the file does, 'box'" in message and "'tent'" in message


def test_an_unknown_class_is_told_with_those_of_the_file(path):
    message = serious(audited(path, ('house',)))
    assert "class 'house' is not among its categories" in message
    assert 'num_classes' in message and 'none can be used' in message


def test_the_order_of_the_classes_is_free(path):
    audit = audited(path, ('tent', 'ball', 'box'))
    assert not audit.findings and list(audit.usable) == ['tent', 'ball', 'box']
    assert audit.usable['box'] == audited(path).usable['box']


def test_images_that_filter_cfg_leaves_out_are_not_counted(path):
    def narrow(content):
        for image in content['images'][:5]:
            image['width'] = 30

    everything = audited(changed(path, narrow))
    audit = audited(path, filter_cfg=dict(filter_empty_gt=False, min_size=32))
    assert (everything.kept, audit.kept, audit.images) == (12, 7, 12)
    assert not serious(audit)
    assert '5 of 12 images have a side shorter than filter_cfg.min_size=32' in notes(audit)
    assert sum(audit.usable.values()) < sum(everything.usable.values())
    nothing = serious(audited(path, filter_cfg=dict(min_size=1000)))
    assert re.search(r'none can be used .*are on images that filter_cfg leaves out', nothing)


def test_images_without_boxes_are_left_out_where_asked_for(path):
    def without(content):
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 2]

    audit = audited(changed(path, without), filter_cfg=dict(filter_empty_gt=True, min_size=32))
    assert audit.kept == 10 and not audit.findings


def test_crowds_are_named_as_the_reason(path):
    audit = audited(changed(path, lambda c: each(c, lambda a: a.update(iscrowd=1))))
    assert re.search(r'of (\d+) boxes none can be used .*: \1 are crowds', serious(audit))


def test_crowds_of_one_class_are_named_as_the_reason(path):
    def crowds(content):
        each(content, lambda a: a['category_id'] == 3 and a.update(iscrowd=1))

    assert re.search(
        r'no usable box of tent: \d+ are crowds', notes(audited(changed(path, crowds)))
    )


def test_categories_that_are_not_trained_are_a_note(path):
    audit = audited(path, ('box', 'tent'))
    assert not serious(audit)
    assert re.search(r'are left out \(ball: \d+\)', notes(audit))


def test_a_class_without_boxes_is_a_note(path):
    def other(content):
        each(content, lambda a: a.update(category_id=min(a['category_id'], 2)))

    audit = audited(changed(path, other))
    assert not serious(audit) and 'no usable box of tent' in notes(audit)
    assert audit.usable['tent'] == 0


def test_a_few_empty_boxes_among_thousands_are_a_note(path):
    def many(content):
        for copy in range(60):
            content['annotations'] += [
                dict(a, id=1000 * copy + a['id'] + 1000, bbox=a['bbox'][:])
                for a in content['annotations'][:36]
            ]
        content['annotations'][0]['bbox'][3] = 0

    audit = audited(changed(path, many))
    assert not serious(audit) and '1 of ' in notes(audit)


def test_boxes_out_of_their_images_are_counted(path):
    def wider(content):
        content['annotations'][0]['bbox'][2] = 500

    assert re.search(
        r'1 of \d+ boxes reach out of their images', notes(audited(changed(path, wider)))
    )


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        (None, r'\(\d+ bytes\) is cut short or no JSON .*get the file again'),
        ('[]', 'is not in the format of COCO, it has no list of images and of annotations'),
        ('{"images": []}', 'has no list of annotations and of categories'),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r'images\[0\] has no file_name and no width and no height',
        ),
        (
            '{"images": [], "categories": [], "annotations": [{"id": 1, "image_id": 1, "area": 1, '
            '"category_id": 1, "bbox": null}]}',
            r'annotations\[0\] has no bbox',
        ),
    ],
)
def test_what_cannot_be_read_is_one_error(path, text, told):
    path.write_text(path.read_text()[:-500] if text is None else text)
    with pytest.raises(DataError, match=told) as error:
        audited(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('section', 'key', 'value', 'told'),
    [
        ('images', 'width', 0, 'it must be a positive number of pixels'),
        ('images', 'height', '128', 'it must be a positive number of pixels'),
        ('annotations', 'bbox', ['1', '2', '3', '4'], 'it must be four numbers, x, y'),
        ('annotations', 'bbox', [[1], [2], [3], [4]], 'it must be four numbers, x, y'),
        ('annotations', 'bbox', [[1, 2], [3, 4]], 'it must be four numbers, x, y'),
        ('annotations', 'area', '9', 'it must be a number'),
        ('annotations', 'image_id', [1], 'it must be a number or a text'),
        ('annotations', 'iscrowd', 'no', 'it must be 0 or 1'),
        ('categories', 'name', 7, 'it must be a text'),
    ],
)
def test_an_entry_of_another_kind_is_named(path, section, key, value, told):
    changed(path, lambda c: c[section][0].update({key: value}))
    with pytest.raises(DataError, match=rf'{section}\[0\] \(id 1\) has .*{told}') as error:
        audited(path, with_mask=True)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_a_whole_file_is_read_as_it_is(path):
    assert read_coco(path) == json.loads(path.read_text())
