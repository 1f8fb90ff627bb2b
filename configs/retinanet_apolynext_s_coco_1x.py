# APolyNeXt-S with RetinaNet on COCO, 12 epochs. The recipe (AdamW, lr 1e-4, weight decay .05, drop
# path .1) is that of MogaNet-S, which reaches 45.8 AP with it.
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
