# APolyNeXt-T with RetinaNet on COCO, 12 epochs. The learning rate of 1e-4 is that of MogaNet-S.
_base_ = [
    '_base_/models/retinanet_polynext.py',
    '_base_/datasets/coco_detection.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_t',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_t'),
    ),
    neck=dict(in_channels=[96, 192, 288]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), clip_grad=dict(max_norm=5.0, norm_type=2))
