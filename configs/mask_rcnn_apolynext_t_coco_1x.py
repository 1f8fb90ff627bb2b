# APolyNeXt-T with Mask R-CNN on COCO, 12 epochs.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_t',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_t'),
    ),
    neck=dict(in_channels=[48, 96, 192, 288]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
