"""Peak memory of a training step of a config, on the CPU: ``config_memory.py CONFIG --batch 2``.

Measured as for models alone (measure.py), except that the warm-up step uses small images. Weights,
gradients, activations and scratch space of the whole model count, heads and losses included; what
AdamW keeps, two numbers for each weight, is computed and given apart. Everything random is seeded,
and images are noise with a few objects or classes.
"""

import argparse
import importlib
import os
import sys

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import polynext_mm  # noqa: F401 - registers
import segmentors
from measure import ENVIRONMENT, cpu_peak
from subjects import Workload

_SMALL = 128
_OBJECTS = 7  # of an image of COCO, on average


def segmentation_batch(images: int, size: tuple[int, int]) -> dict:
    """Return images with ten classes in stripes, as mmseg's data loaders do."""
    return _batch(images, size, segmentors.sample(size))


def detection_batch(images: int, size: tuple[int, int]) -> dict:
    """Return images with boxes and masks of a few objects, as mmdet's data loaders do."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    corners = torch.rand(_OBJECTS, 2) * 0.6
    boxes = torch.cat((corners, corners + 0.1 + torch.rand(_OBJECTS, 2) * 0.3), 1)
    boxes *= torch.tensor([width, height, width, height])
    masks = np.zeros((_OBJECTS, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)),
        gt_instances=InstanceData(
            bboxes=boxes,
            labels=torch.arange(_OBJECTS),
            masks=BitmapMasks(masks, height, width),
        ),
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()),
    )
    return _batch(images, size, sample)


def _batch(images: int, size: tuple[int, int], sample) -> dict:
    return dict(
        inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(images)],
        data_samples=[sample.clone() for _ in range(images)],
    )


def workload(cfg: Config, images: int, size: tuple[int, int]) -> tuple[Workload, int]:
    """Return what to measure, and the bytes that AdamW keeps for this model."""
    torch.manual_seed(0)
    cfg.model.backbone.init_cfg = None
    if 'size' in cfg.model.data_preprocessor:  # to which all images would be padded
        cfg.model.data_preprocessor.update(size=None, size_divisor=32)
    init_default_scope(cfg.default_scope)
    importlib.import_module(f'{cfg.default_scope}.models')
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    make = segmentation_batch if cfg.default_scope == 'mmseg' else detection_batch
    batches = iter([make(images, (_SMALL, _SMALL)), make(images, size)])

    def step():
        data = model.data_preprocessor(next(batches), True)
        with wrapper.optim_context(model):
            loss, _ = model.parse_losses(model._run_forward(data, mode='loss'))
        loss.backward()
        model.zero_grad(set_to_none=True)

    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(param.nbytes for param in model.parameters() if param.requires_grad)
    return Workload(step, held), 2 * trained


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Peak memory of a training step of a config')
    parser.add_argument('config', help='config file')
    parser.add_argument('--batch', type=int, default=2, help='images (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512), metavar=('H', 'W'))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='settings of the config to override, as key=value',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # glibc reads them when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    work, optimizer = workload(cfg, args.batch, tuple(args.size))
    peak, method = cpu_peak(work)
    if method != 'VmHWM':
        sys.exit('needs a Linux that resets VmHWM: /proc/self/clear_refs cannot be written')
    print(
        f'{args.config}, {args.batch} images of {args.size[0]}x{args.size[1]}, '
        f'{cfg.optim_wrapper.dtype}: {peak / 2**20:.0f} MiB, and {optimizer / 2**20:.0f} MiB of '
        'AdamW'
    )


if __name__ == '__main__':
    main()
