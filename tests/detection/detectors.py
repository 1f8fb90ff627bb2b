"""What the tests of detectors share: a config's model at a small size, and an image with two objects."""

import importlib
from pathlib import Path

import numpy as np
import torch
from mmengine import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import polynext_mm  # noqa: F401 - mmcv's operators, before mmdet is imported

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*polynext*_coco_*.py'))


def load(name: str) -> Config:
    """A config without weights to fetch, with few regions to sample and 20 predictions whatever their
    scores: seconds instead of many."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.model.backbone.init_cfg = None
    rcnn = cfg.model.train_cfg.get('rcnn', [])
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.num = 16
    cfg.model.test_cfg.get('rpn', {}).update(max_per_img=50)
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).update(score_thr=0.0, max_per_img=20)
    return cfg


def build(cfg: Config):
    """The detector of a config, in training mode with seeded weights, and its optimizer wrapper."""
    init_default_scope('mmdet')
    importlib.import_module('mmdet.models')
    from mmengine.model import revert_sync_batchnorm

    torch.manual_seed(0)
    model = revert_sync_batchnorm(importlib.import_module('mmdet.registry').MODELS.build(cfg.model))
    model.init_weights()
    return model.train(), build_optim_wrapper(model, cfg.optim_wrapper)


def batch(size: int = 96, images: int = 1) -> dict:
    """What a data loader of mmdet gives: images with two objects each, with boxes and masks.

    Not below 96 pixels: on the CPU torch 2.14 leaves parts of the weight gradient of a bfloat16
    convolution unwritten where a 3x3 of stride 2 meets a 1x1 map, as RetinaNet's last level does at 64.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    torch.manual_seed(1)
    boxes = torch.tensor([[0.05, 0.1, 0.7, 0.6], [0.45, 0.3, 0.95, 0.95]]) * size
    masks = np.zeros((2, size, size), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(size, size),
            ori_shape=(size, size),
            pad_shape=(size, size),
            scale_factor=(1.0, 1.0),
        ),
        gt_instances=InstanceData(
            bboxes=boxes, labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, size, size)
        ),
        ignored_instances=InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)
        ),
    )
    return dict(
        inputs=[torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(images)],
        data_samples=[sample.clone() for _ in range(images)],
    )


def losses(model, wrapper, data: dict):
    """The summed loss and the log of a forward pass in training, as of ``model.train_step``."""
    with wrapper.optim_context(model):
        found = model._run_forward(model.data_preprocessor(data, True), mode='loss')
        return model.parse_losses(found)
