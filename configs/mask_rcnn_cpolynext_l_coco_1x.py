# CPolyNeXt-L with Mask R-CNN on COCO, 12 epochs. The drop path rate is a guess: that of MogaNet-S
# (.1), raised for the larger network.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_l',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_l'),
    ),
    neck=dict(in_channels=[96, 192, 384, 576]),
)
