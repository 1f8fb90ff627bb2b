"""A tiny segmentor and a tiny detector that have learned nothing, as files."""

from pathlib import Path

import torch
from mmengine.config import Config

from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.tiny import TINY_ARCH

CLASSES = ('field', 'wood', 'water')
PALETTE = [[200, 180, 90], [20, 120, 40], [40, 80, 220]]


def write_model(folder: Path, text: str) -> tuple[Path, Path]:
    """Write a config and a checkpoint of a model that has learned nothing."""
    config = folder / 'config.py'
    config.write_text(text)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    weights = folder / 'weights.pth'
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    torch.save(dict(state_dict=build_model(cfg).state_dict(), meta=meta), weights)
    return config, weights


def write_segmentor(folder: Path) -> tuple[Path, Path]:
    return write_model(
        folder,
        f"""
_base_ = '{ROOT}/configs/upernet_cpolynext_t_ade20k.py'
model = dict(
    backbone=dict(_delete_=True, type='PolyNeXt', arch={TINY_ARCH!r}),
    decode_head=dict(in_channels=[8, 16, 16, 24], channels=8, num_classes=3),
    auxiliary_head=dict(in_channels=16, channels=8, num_classes=3),
    test_cfg=dict(_delete_=True, mode='whole'))
test_pipeline = [dict(type='LoadImageFromFile'),
                 dict(type='Resize', scale=(128, 64), keep_ratio=True),
                 dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""",
    )


def write_detector(folder: Path) -> tuple[Path, Path]:
    """Mask R-CNN, tiny."""
    return write_model(
        folder,
        f"""
_base_ = '{ROOT}/configs/mask_rcnn_cpolynext_t_coco_1x.py'
model = dict(
    backbone=dict(_delete_=True, type='PolyNeXt', arch={TINY_ARCH!r}),
    neck=dict(in_channels=[8, 16, 16, 24], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=3)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)))
test_pipeline = [dict(type='LoadImageFromFile'),
                 dict(type='Resize', scale=(96, 96), keep_ratio=True),
                 dict(type='PackDetInputs',
                      meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(dataset=dict(
    pipeline=test_pipeline, metainfo=dict(classes={CLASSES!r}, palette={PALETTE!r})))
""",
    )
