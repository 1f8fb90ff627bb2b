"""Segmentors and detectors whose normalization is not that of the published weights."""

import importlib
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from polynext_mm.engine import CheckpointGuardHook
from polynext_mm.engine.checks.normalization import find_mismatch
from polynext_mm.weights import CheckpointError
from tests.coco_sample import data_options, make_coco
from tests.helpers.checkpoints import imagenet_weights, segmentor_file
from tests.helpers.configs import TINY_NETWORK, build_model, config_to_load_into
from tests.helpers.files import ROOT
from tests.helpers.networks import ARCH, build
from tests.helpers.samples import ade20k_scenes, few_scenes

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
# CIFAR-10's, from the release's utils.py, which are for values from 0 to 1
LOW_RESOLUTION = dict(
    mean=[255 * mean for mean in (0.49139968, 0.48215827, 0.44653124)],
    std=[255 * std for std in (0.24703233, 0.24348505, 0.26158768)],
    bgr_to_rgb=True,
)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)


def model_with(**preprocessor) -> nn.Module:
    scope = preprocessor['type'].split('.')[0]
    importlib.import_module(f'{scope}.models')
    model = nn.Module()
    model.data_preprocessor = MODELS.build(preprocessor)
    return model


@pytest.mark.parametrize('kind', ['mmseg.SegDataPreProcessor', 'mmdet.DetDataPreprocessor'])
@pytest.mark.parametrize(
    ('settings', 'described'),
    [
        (IMAGENET, None),
        (dict(mean=[124, 116, 104], std=[58, 57, 57], bgr_to_rgb=True), None),
        (CAFFE, 'BGR images with mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]'),
        (dict(IMAGENET, bgr_to_rgb=False), 'BGR images with mean=[123.675, 116.28, 103.53]'),
        (
            dict(IMAGENET, std=[1.0, 1.0, 1.0]),
            'RGB images with mean=[123.675, 116.28, 103.53], std=[1',
        ),
        (dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True), 'mean=[127.5, 127.5, 127.5]'),
        (dict(), 'BGR images with mean=[0.0], std=[1.0]'),  # as YOLOX
    ],
    ids=str,
)
def test_normalizations_are_told_apart(kind, settings, described):
    mismatch = find_mismatch(model_with(type=kind, **settings))
    if described is None:
        assert mismatch is None
    else:
        assert described in str(mismatch) and mismatch.is_certain
        assert 'RGB images (bgr_to_rgb=True) with mean=[123.675, 116.28, 103.53]' in mismatch.text


def test_wrapped_and_unknown_preprocessors():
    inner = dict(type='mmdet.DetDataPreprocessor', **CAFFE)
    semi = model_with(type='mmdet.MultiBranchDataPreprocessor', data_preprocessor=inner)
    assert 'BGR images' in str(find_mismatch(semi))
    unknown = nn.Module()
    assert find_mismatch(unknown) is None
    unknown.data_preprocessor = nn.Identity()
    assert find_mismatch(unknown) is None


class ClsDataPreprocessor(BaseDataPreprocessor):
    """As mmpretrain's and mmaction2's: BGR to RGB by another name."""

    def __init__(self, mean, std, to_rgb=False):
        super().__init__()
        self._enable_normalize = True
        self.to_rgb = to_rgb
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))


def test_preprocessors_of_other_packages_are_at_most_a_warning():
    model = nn.Module()
    values = dict(mean=IMAGENET['mean'], std=IMAGENET['std'])
    model.data_preprocessor = ClsDataPreprocessor(**values, to_rgb=True)
    assert find_mismatch(model) is None
    model.data_preprocessor = ClsDataPreprocessor(**values)
    mismatch = find_mismatch(model)
    assert 'gives BGR images' in mismatch.text and 'RGB images (to_rgb=True)' in mismatch.text
    assert not mismatch.is_certain
    guard = CheckpointGuardHook()
    guard._check_normalization(model, is_error=True)  # warns
    model.data_preprocessor = ImgDataPreprocessor(**values)
    with pytest.raises(CheckpointError, match='gives BGR images'):
        guard._check_normalization(model, is_error=True)


@pytest.mark.parametrize('images', [1, 2, 3])
def test_images_stacked_along_their_channels_repeat_the_values(images):
    """As the two of change detection."""
    model = nn.Module()
    model.data_preprocessor = ClsDataPreprocessor(
        IMAGENET['mean'] * images, IMAGENET['std'] * images, to_rgb=True
    )
    assert find_mismatch(model) is None
    model.data_preprocessor.mean[-1] = 0
    assert find_mismatch(model) is not None


def test_a_backbone_within_a_tracker_tells_its_normalization():
    model = model_with(type='mmdet.DetDataPreprocessor', **LOW_RESOLUTION)
    model.detector = nn.Module()
    model.detector.backbone = build(arch='cpolynext_lr')
    assert find_mismatch(model) is None


def test_channels_other_than_rgb_have_no_published_normalization():
    settings = dict(mean=[1.0], std=[2.0])
    model = model_with(type='mmseg.SegDataPreProcessor', **settings)
    model.backbone = build(in_channels=4)
    assert find_mismatch(model) is None
    model.backbone = build()
    assert find_mismatch(model) is not None


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem
)
def test_all_configs_normalize_as_the_weights_expect(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    kind = f'{cfg.default_scope}.{cfg.model.data_preprocessor.pop("type")}'
    model = model_with(type=kind, **cfg.model.data_preprocessor)
    if cfg.model.get('backbone', {}).get('arch') == 'cpolynext_lr':
        model.backbone = build(arch='cpolynext_lr')
    assert find_mismatch(model) is None


@pytest.mark.parametrize(
    ('settings', 'arch'),
    [(LOW_RESOLUTION, 'cpolynext_lr'), (IMAGENET, ARCH), (CAFFE, None)],
    ids=['low resolution', 'imagenet', 'caffe'],
)
def test_the_low_resolution_network_has_another_normalization(settings, arch):
    model = model_with(type='mmseg.SegDataPreProcessor', **settings)
    for other in ('cpolynext_lr', ARCH):
        model.backbone = build(arch=other)
        assert (find_mismatch(model) is None) == (other == arch)
    model.backbone = build(arch='cpolynext_lr')
    if arch != 'cpolynext_lr':
        expected = 'RGB images (bgr_to_rgb=True) with mean=[125.307, 122.95, 113.865], std=[62.993'
        assert expected in str(find_mismatch(model))


# Runs of segmentors and detectors


@pytest.fixture(scope='module')
def imagenet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'imagenet.pt'
    torch.save(imagenet_weights(), path)
    return path


def segmentor(tmp_path, **options) -> Config:
    return config_to_load_into(ade20k_scenes(), tmp_path / 'work', **options)


def detector(tmp_path) -> Config:
    classes = importlib.import_module('mmdet.datasets').CocoDataset.METAINFO['classes']
    root = make_coco(tmp_path / 'coco', classes, train=2, val=1)
    cfg = Config.fromfile(ROOT / 'configs' / f'retinanet_{ARCH}_coco_1x.py')
    options = dict(option.split('=', 1) for option in data_options(root))
    for key, value in options.items():
        options[key] = {'0': 0, 'False': False}.get(value, value)
    cfg.merge_from_dict(options)
    cfg.merge_from_dict(dict(val_cfg=None, val_dataloader=None, val_evaluator=None))
    cfg.train_dataloader.dataset.pipeline[2].scale = (96, 96)
    cfg.train_cfg.max_epochs = 1
    cfg.work_dir = str(tmp_path / 'work')
    return cfg


def normalized(cfg: Config, settings: dict) -> Config:
    """Replace the normalization of a config."""
    for key in IMAGENET:
        cfg.model.data_preprocessor.pop(key)
    cfg.model.data_preprocessor.update(settings)
    return cfg


TASKS = pytest.mark.parametrize('task', [segmentor, detector])


@pytest.mark.heavy
@TASKS
def test_training_from_imagenet_weights_with_another_normalization_is_refused(task, tmp_path):
    cfg = normalized(task(tmp_path), CAFFE)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='polynext://never_fetched')
    runner = Runner.from_cfg(cfg)
    with pytest.raises(CheckpointError, match='data_preprocessor gives BGR images') as caught:
        runner.train()
    assert "dict(type='CheckpointGuardHook', allow_other_normalization=True)" in str(caught.value)
    assert runner.iter == 0


@pytest.mark.heavy
def test_another_normalization_may_be_meant(tmp_path, imagenet_file):
    cfg = normalized(segmentor(tmp_path), CAFFE)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(imagenet_file))
    cfg.custom_hooks[0].allow_other_normalization = True
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter >= 1


@pytest.mark.heavy
@pytest.mark.parametrize('settings', [LOW_RESOLUTION, IMAGENET], ids=['cifar10', 'imagenet'])
def test_low_resolution_files_start_a_training_with_their_normalization(settings, tmp_path):
    """Also through ``load_from``; anything else is refused."""
    path = tmp_path / 'cpolynext_lr.pt'
    torch.save(imagenet_weights('cpolynext_lr'), path)
    for field in ('init_cfg', 'load_from') if settings is LOW_RESOLUTION else ('load_from',):
        cfg = Config.fromfile(ROOT / 'configs' / 'upernet_cpolynext_lr_materials.py')
        cfg.train_dataloader.dataset.data_root = str(few_scenes())
        cfg.merge_from_dict(dict(val_cfg=None, val_dataloader=None, val_evaluator=None))
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
        cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
        cfg.work_dir = str(tmp_path / field)
        cfg.experiment_name = f'{tmp_path.name}_{field}'
        if settings is not LOW_RESOLUTION:  # which is the config's
            cfg = normalized(cfg, settings)
        if field == 'load_from':
            cfg.load_from = str(path)
        else:
            cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
        runner = Runner.from_cfg(cfg)
        if settings is LOW_RESOLUTION:
            runner.train()
            assert runner.iter == 1
        else:
            with pytest.raises(CheckpointError, match=r'expect RGB .* mean=\[125.307, 122.95'):
                runner.train()


@pytest.mark.heavy
def test_training_from_scratch_may_normalize_as_it_likes(tmp_path):
    cfg = normalized(segmentor(tmp_path, **TINY_NETWORK), CAFFE)
    assert cfg.model.backbone.init_cfg is None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 1


def evaluate(cfg: Config, content: dict, tmp_path, tta: bool = False) -> str:
    """Evaluate a checkpoint and return the warnings in the log."""
    torch.save(content, tmp_path / 'model.pth')
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler'):
        cfg.pop(key)
    cfg.load_from = str(tmp_path / 'model.pth')
    cfg.experiment_name = tmp_path.name  # the default names a second, and loggers by that name
    if tta:
        cfg.model = dict(cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    Runner.from_cfg(cfg).test()
    (log,) = (tmp_path / 'work').glob('*/*.log')
    return '\n'.join(re.findall('WARNING - (.*)', log.read_text()))


@pytest.mark.heavy
@pytest.mark.parametrize('tta', [False, True])
def test_the_authors_segmentor_with_another_normalization_is_refused(tta, tmp_path):
    cfg = segmentor(tmp_path)
    content = segmentor_file(cfg)
    with pytest.raises(CheckpointError, match='data_preprocessor gives BGR images'):
        evaluate(normalized(cfg, CAFFE), content, tmp_path, tta)


@pytest.mark.heavy
def test_the_authors_weights_as_load_from_with_another_normalization_are_refused(
    tmp_path, imagenet_file
):
    cfg = normalized(segmentor(tmp_path), CAFFE)
    cfg.load_from = str(imagenet_file)
    with pytest.raises(CheckpointError, match='data_preprocessor gives BGR images'):
        Runner.from_cfg(cfg).train()


@pytest.mark.heavy
@pytest.mark.parametrize('settings', [IMAGENET, CAFFE], ids=['imagenet', 'caffe'])
def test_evaluating_a_checkpoint_of_ones_own_warns(settings, tmp_path):
    cfg = normalized(segmentor(tmp_path, **TINY_NETWORK), settings)
    content = dict(meta={}, state_dict=build_model(cfg).state_dict())
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='polynext://never_fetched')
    warnings = evaluate(cfg, content, tmp_path)
    assert ('data_preprocessor gives BGR images' in warnings) == (settings is CAFFE)
    assert ('only if the checkpoint was trained like that' in warnings) == (settings is CAFFE)
