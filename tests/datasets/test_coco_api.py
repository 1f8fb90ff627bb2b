"""COCO's annotations as mmdet reads them, and what CocoMetric makes of perfect detections."""

import json

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from polynext_mm.datasets import audit_coco


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def written(folder, categories, annotations, name='boxes.json'):
    """Write two images of 64x64 and their annotations."""
    for number in range(2):
        path = folder / f'{number}.png'
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(path)
    images = [dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(2)]
    path = folder / name
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))
    return path


def boxes(categories, ids, **more):
    """One box in each image, of the two categories in turn."""
    return [
        dict(
            id=identity,
            image_id=i,
            category_id=categories[i % len(categories)]['id'],
            bbox=[8, 8, 40, 40],
            area=1600,
            **more,
        )
        for i, identity in enumerate(ids)
    ]


def average_precision(path, classes, labels):
    """Of a detection that is right in each image."""
    from mmdet.registry import METRICS

    metric = METRICS.build(dict(type='CocoMetric', ann_file=str(path), metric='bbox'))
    metric.dataset_meta = dict(classes=classes)
    for image, label in enumerate(labels):
        found = dict(
            bboxes=torch.tensor([[8.0, 8, 48, 48]]),
            scores=torch.tensor([0.9]),
            labels=torch.tensor([label]),
        )
        metric.process({}, [dict(img_id=image, ori_shape=(64, 64), pred_instances=found)])
    return metric.evaluate(2)['coco/bbox_mAP']


def trained_labels(path, classes):
    dataset = DATASETS.build(
        dict(
            type='CocoDataset',
            ann_file=str(path),
            data_prefix=dict(img=f'{path.parent}/'),
            metainfo=dict(classes=classes),
            pipeline=[],
        )
    )
    return [[box['bbox_label'] for box in dataset.get_data_info(i)['instances']] for i in range(2)]


CATEGORIES = [dict(id=4, name='nut'), dict(id=7, name='bolt')]


@pytest.mark.parametrize(
    'ids', [(0, 1), (1, 0), (-1, 3), ('a', 'b'), (5, 9)], ids=lambda ids: f'{ids[0]} {ids[1]}'
)
@pytest.mark.parametrize('iscrowd', [{}, dict(iscrowd=0), dict(iscrowd=None), dict(iscrowd='0')])
def test_perfect_detections_are_perfect(tmp_path, ids, iscrowd):
    path = written(tmp_path, CATEGORIES, boxes(CATEGORIES, ids, **iscrowd))
    assert not audit_coco(path, ('nut', 'bolt')).findings
    assert average_precision(path, ('nut', 'bolt'), (0, 1)) == pytest.approx(1)


@pytest.mark.parametrize('order', [1, -1], ids=['file', 'file reversed'])
@pytest.mark.parametrize('classes', [('nut', 'bolt'), ('bolt', 'nut')], ids=' '.join)
def test_a_label_is_the_place_of_a_name_in_the_classes(tmp_path, order, classes):
    """In training and evaluation, in whatever order the file lists its categories."""
    path = written(tmp_path, CATEGORIES[::order], boxes(CATEGORIES, (1, 2)))
    labels = classes.index('nut'), classes.index('bolt')
    assert trained_labels(path, classes) == [[label] for label in labels]
    assert average_precision(path, classes, labels) == pytest.approx(1)
    assert average_precision(path, classes, labels[::-1]) == pytest.approx(0)
    assert not audit_coco(path, classes).findings


def test_one_class_of_several_has_the_label_0(tmp_path):
    path = written(tmp_path, CATEGORIES, boxes(CATEGORIES, (1, 2)))
    assert trained_labels(path, ('bolt',)) == [[], [0]]


def test_a_parent_of_the_same_name_is_refused_and_renamed_it_trains(tmp_path):
    parent = dict(id=0, name='nut', supercategory='none')
    categories = [dict(id=1, name='nut', supercategory='nut'), dict(id=2, name='bolt')]
    annotations = boxes(categories, (1, 2))
    path = written(tmp_path, [parent, *categories], annotations)
    told = ' '.join(map(str, audit_coco(path, ('nut', 'bolt')).findings))
    assert "more than one category has the name 'nut' (id 0 with 0 boxes, id 1 with 1" in told
    assert 'rename the category without boxes (id 0), such as to "all nut"' in told
    path = written(tmp_path, [dict(parent, name='all nut'), *categories], annotations)
    assert not audit_coco(path, ('nut', 'bolt')).findings
    assert trained_labels(path, ('nut', 'bolt')) == [[0], [1]]
