# CPolyNeXt-S with Cascade Mask R-CNN on COCO, 36 epochs, multi-scale. The drop path rate of .2 is
# that of mmdet's 3x configs for Swin-S.
_base_ = [
    '_base_/models/cascade_mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance_ms_crop.py',
    '_base_/schedules/coco_3x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    neck=dict(in_channels=[72, 144, 288, 432]),
)
