# CPolyNeXt-S with DINO on COCO, 12 epochs. Swin-T reaches 51.3 AP with this recipe (detrex),
# ResNet-50 49.0 (mmdet). The drop path rate of .2 is that of mmdet's config for Swin-L.
_base_ = [
    '_base_/models/dino_polynext.py',
    '_base_/datasets/coco_detection_ms_crop.py',
    '_base_/schedules/dino_12e.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    neck=dict(in_channels=[144, 288, 432]),
)
