"""Sizes, batches and results that would fail hours later, told before the first step."""

import re

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.optim import OptimWrapper
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from polynext_mm.commands import test as test_command
from polynext_mm.engine.checks.config import ConfigError
from polynext_mm.engine.checks.data import inspect_sources
from polynext_mm.engine.checks.training import TrainingCheckHook
from polynext_mm.engine.results import LabelImages, files_of, label_file, root_of
from polynext_mm.written import OverwriteError
from tests.helpers.files import contents
from tests.segmentation_sample import image_path, make_segmentation, segmentation_config

SLIDES = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))
KEEPS_SIZE = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
SCALED = [KEEPS_SIZE[0], dict(type='Resize', scale=(64, 64)), KEEPS_SIZE[1]]
MANY = {'model.decode_head.num_classes': 4000}


def findings(cfg) -> str:
    return '\n'.join(str(finding) for finding in inspect_sources(cfg, ['train', 'val'])[1])


@pytest.fixture
def data(tmp_path):
    return make_segmentation(tmp_path / 'data')


def resize(path, width: int, height: int) -> None:
    Image.open(path).resize((width, height)).save(path)


def test_small_images_of_a_validation(data):
    cfg = segmentation_config(data)
    cfg.val_dataloader.dataset.pipeline = KEEPS_SIZE
    assert findings(cfg) == ''
    resize(image_path(data, 'val', 1), 64, 20)
    resize(image_path(data, 'train', 1), 64, 20)  # training pads its crops
    told = findings(cfg)
    assert '1 of 3 images' in told and 'val/01.jpg: 64x20' in told
    assert 'model.data_preprocessor.test_cfg=dict(size_divisor=32)' in told
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    assert findings(cfg) == ''


def test_thin_images_stay_thin_when_they_are_scaled(data):
    cfg = segmentation_config(data)
    scaled = [KEEPS_SIZE[0], dict(type='Resize', scale=(100, 50), keep_ratio=True), KEEPS_SIZE[1]]
    cfg.val_dataloader.dataset.pipeline = scaled
    resize(image_path(data, 'val', 0), 20, 20)
    assert findings(cfg) == ''
    resize(image_path(data, 'val', 1), 200, 50)
    assert 'val/01.jpg: 100x25' in findings(cfg)
    scaled[1]['keep_ratio'] = False
    cfg.val_dataloader.dataset.pipeline = scaled
    assert findings(cfg) == ''


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        ({}, 'val/01.jpg has 640x48 pixels: .*mode=.slide., crop_size'),
        ({'model.test_cfg': SLIDES}, ''),
        ({'model.test_cfg': SLIDES, **MANY}, 'cut such images'),
        (MANY, 'cut such images'),
        ({'model.decode_head.channels': 2}, ''),
        ({'val_dataloader.dataset.pipeline': SCALED}, ''),
        ({'val_dataloader.dataset.pipeline': SCALED, **MANY}, 'val/01.jpg has 640x48 pixels'),
    ],
)
def test_images_that_need_more_memory_than_there_is(settings, told, data, monkeypatch):
    cfg = segmentation_config(data)
    cfg.val_dataloader.dataset.pipeline = KEEPS_SIZE
    cfg.model.test_cfg = dict(mode='whole')
    cfg.merge_from_dict(settings)
    resize(image_path(data, 'val', 1), 640, 48)
    assert findings(cfg) == ''
    monkeypatch.setattr('os.sysconf', {'SC_PHYS_PAGES': 1000, 'SC_PAGE_SIZE': 1000}.__getitem__)
    assert re.search(told, findings(cfg)) if told else not findings(cfg)


def test_batches_of_several_sizes_of_a_validation(data):
    cfg = segmentation_config(data)
    cfg.val_dataloader.dataset.pipeline = KEEPS_SIZE
    cfg.val_dataloader.batch_size = 2
    resize(image_path(data, 'val', 2), 64, 64)  # alone in its batch
    assert findings(cfg) == ''
    resize(image_path(data, 'val', 1), 64, 64)
    assert 'set val_dataloader.batch_size=1' in findings(cfg)


class Runner:
    """As much of a runner as the check looks at."""

    world_size = 1

    def __init__(self, images: int, batch_size: int, sampler=DefaultSampler, **options):
        data = list(range(images))
        self.model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.model = nn.ModuleDict(dict(head=self.model))
        self.train_dataloader = DataLoader(
            data, batch_size, sampler=sampler(data, shuffle=False), **options
        )
        self.max_iters = 100


@pytest.mark.parametrize(
    ('runner', 'remedy'),
    [
        (Runner(5, 2), 'has 1 image .5 images in batches of 2.*train_dataloader.drop_last=True'),
        (Runner(7, 3), 'train_dataloader.drop_last=True'),
        (Runner(1, 2), 'train_dataloader.drop_last=True'),
        (Runner(6, 1), 'batch of 1 cannot work.*batch_size=2 or more'),
        (Runner(5, 1, InfiniteSampler), 'batch_size=2 or more'),
    ],
)
def test_batches_of_one_are_refused(runner, remedy):
    with pytest.raises(ConfigError, match=remedy):
        TrainingCheckHook._refuse_batch_of_one(runner)


def test_other_batches_pass():
    for runner in (
        Runner(6, 2),
        Runner(8, 3),
        Runner(5, 2, drop_last=True),
        Runner(5, 2, InfiniteSampler),
    ):
        TrainingCheckHook._refuse_batch_of_one(runner)
    short = Runner(5, 2)
    short.max_iters = 2  # ends before it comes
    TrainingCheckHook._refuse_batch_of_one(short)
    plain = Runner(5, 2)
    plain.model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    TrainingCheckHook._refuse_batch_of_one(plain)


def test_weights_of_classes_with_sigmoid_weigh_classes():
    from mmseg.models.losses import CrossEntropyLoss

    runner = Runner(6, 2)
    weights = [1.0, 3.0]
    loss = CrossEntropyLoss(use_sigmoid=True, class_weight=weights)
    runner.model['loss'] = loss
    optimizer = torch.optim.SGD(runner.model.parameters(), 0.1)
    runner.optim_wrapper = OptimWrapper(optimizer)
    TrainingCheckHook().before_train(runner)
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 2, 4, 5), torch.randint(0, 2, (2, 4, 5))
    one_hot = torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    parts = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            scores[:, i], one_hot[:, i], pos_weight=torch.tensor(weight)
        )
        for i, weight in enumerate(weights)
    ]
    torch.testing.assert_close(loss(scores, labels), sum(parts) / 2)
    one, ignored = torch.randn(2, 1, 4, 5), torch.full((2, 4, 5), 255)
    assert loss(one, ignored, ignore_index=255) == 0


# Results


def test_images_of_one_name_in_folders_keep_their_label_images(tmp_path):
    paths = [str(tmp_path / 'images' / folder / '000.png') for folder in 'ab']
    assert root_of(paths) == str(tmp_path / 'images')
    metric = LabelImages(str(tmp_path / 'out'), root_of(paths))
    ids = torch.tensor([[[0, 3], [1, 2]]])
    for path in paths:
        sample = dict(pred_sem_seg=dict(data=ids), img_path=path)
        metric.process({}, [sample, dict(sample, img_path=path[:-7] + 'x.png')])
        metric.process({}, [dict(sample, img_path=path[:-7] + 'z.png', reduce_zero_label=True)])
    written = sorted(path.relative_to(tmp_path / 'out') for path in tmp_path.rglob('out/*/*.png'))
    assert list(map(str, written)) == [f'{a}/{b}.png' for a in 'ab' for b in ('000', 'x', 'z')]
    assert (np.asarray(Image.open(tmp_path / 'out/a/x.png')) == ids[0].numpy()).all()
    assert (np.asarray(Image.open(tmp_path / 'out/a/z.png')) == ids[0].numpy() + 1).all()
    assert label_file('out', None, '/data/a.jpg').name == 'a.png'


@pytest.mark.parametrize('folder', ['labels/val', 'labels/train'])
def test_an_evaluation_writes_over_no_label(data, folder):
    cfg = segmentation_config(data)
    (data / 'labels/val/03.png').write_bytes((data / 'labels/val/00.png').read_bytes())
    images, labels = files_of(cfg, 'test')
    assert len(images) == len(labels) == 3
    before = contents(data)
    args = test_command.build_parser().parse_args(
        ['config', 'weights.pth', '--out', str(data / folder)]
    )
    with pytest.raises(OverwriteError, match='is an input .* take another --out'):
        test_command.require_results_apart(cfg, args)
    args.out = str(data / 'out')
    assert test_command.require_results_apart(cfg, args) == str(data / 'images/val')
    assert contents(data) == before
