# CPolyNeXt-T with RetinaNet on COCO, 12 epochs. The learning rate of 1e-4 is that of MogaNet-S.
_base_ = [
    '_base_/models/retinanet_polynext.py',
    '_base_/datasets/coco_detection.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_t',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_t'),
    ),
    neck=dict(in_channels=[96, 192, 288]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
