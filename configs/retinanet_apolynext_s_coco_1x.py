# APolyNeXt-S with RetinaNet on COCO, 12 epochs (MogaNet-S: AdamW, lr 1e-4, weight decay
# .05, drop path .1; 45.8 AP).
_base_ = [
    '_base_/models/retinanet_polynext.py',
    '_base_/datasets/coco_detection.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_s',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    neck=dict(in_channels=[144, 288, 432]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), clip_grad=dict(max_norm=5.0, norm_type=2))
