# CPolyNeXt-S with Mask R-CNN on COCO, 36 epochs, multi-scale. The drop path rate of .2 is that of
# mmdet's configs for Swin-T and Swin-S.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance_ms_crop.py',
    '_base_/schedules/coco_3x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    neck=dict(in_channels=[72, 144, 288, 432]),
)
