# CPolyNeXt-T with Mask R-CNN on COCO, 12 epochs.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_t',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_t'),
    ),
    neck=dict(in_channels=[48, 96, 192, 288]),
)
