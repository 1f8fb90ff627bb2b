"""Segmentors and detectors of the configs, made small, as configs, models and files."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from polynext_mm.nn import get_arch
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.tiny import TINY_ARCH, randomized

SEGMENTOR = 'upernet_cpolynext_t_ade20k'
RETINANET = 'retinanet_cpolynext_t_coco_1x'
ATSS = 'atss_cpolynext_materials'


def config(name: str, arch: str | dict = TINY_ARCH, **options) -> Config:
    """Load a config with narrow heads on another arch, and options of its model."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.model.backbone.update(arch=arch, init_cfg=None)
    widths = get_arch(arch).widths
    if 'neck' in cfg.model:
        cfg.model.neck.update(
            in_channels=[widths[stage] for stage in cfg.model.backbone.out_indices], out_channels=16
        )
        cfg.model.bbox_head.update(in_channels=16, feat_channels=32, num_classes=3)
    else:
        cfg.model.decode_head.update(in_channels=list(widths), channels=16, num_classes=5)
        cfg.model.auxiliary_head.update(in_channels=widths[2], channels=16, num_classes=5)
        cfg.model.test_cfg = dict(mode='whole')
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    return cfg


def model(cfg: Config) -> nn.Module:
    """Build the model with weights and batch norms with which all of its parts matter."""
    built = randomized(build_model(cfg)).eval()
    for layer in built.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            torch.manual_seed(0)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return built


def files(cfg: Config, folder: Path) -> tuple[Path, Path]:
    """Write a config and a checkpoint of its model."""
    paths = folder / 'config.py', folder / 'weights.pth'
    cfg.dump(paths[0])
    meta = dict(dataset_meta=dict(classes=['sky', 'road', 'tree', 'car', 'sign']))
    torch.save(dict(state_dict=model(cfg).state_dict(), meta=meta), paths[1])
    return paths
