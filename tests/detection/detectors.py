"""Models of the COCO configs at a small size, and a batch with two objects per image."""

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.structures import InstanceData
from torch import Tensor, nn

from tests.helpers.configs import build_model
from tests.helpers.files import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*polynext*_coco_*.py'))


def load(name: str) -> Config:
    """Load a config, for speed with few regions or queries and 20 predictions of any score.

    No weights are fetched.
    """
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.model.backbone.init_cfg = None
    if cfg.model.type == 'Mask2Former':
        cfg.model.panoptic_head.num_queries = 30
        cfg.model.data_preprocessor.batch_augments[0].size = (96, 96)
        cfg.model.test_cfg.max_per_image = 20
        return cfg
    if cfg.model.type == 'DINO':
        cfg.model.num_queries = 30
    rcnn = cfg.model.train_cfg.get('rcnn', [])
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.num = 16
    cfg.model.test_cfg.get('rpn', {}).update(max_per_img=50)
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).update(score_thr=0.0, max_per_img=20)
    return cfg


def build(cfg: Config) -> tuple[nn.Module, OptimWrapper]:
    """Build a detector in training mode, with seeded weights, and its optimizer wrapper."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    return model.train(), build_optim_wrapper(model, cfg.optim_wrapper)


def batch(size: int = 96, images: int = 1) -> dict:
    """Return images with boxes and masks of two objects each, as mmdet's data loaders do.

    The size must be at least 96: on the CPU, torch 2.14 leaves parts of the weight gradient of a
    bfloat16 convolution unwritten where a 3x3 kernel with stride 2 meets a 1x1 map, as on
    RetinaNet's last level at 64.
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


def losses(model: nn.Module, wrapper: OptimWrapper, data: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss and the log of ``model.train_step``, without a step."""
    with wrapper.optim_context(model):
        found = model._run_forward(model.data_preprocessor(data, True), mode='loss')
        return model.parse_losses(found)
