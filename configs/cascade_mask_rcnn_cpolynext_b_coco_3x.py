# CPolyNeXt-B with Cascade Mask R-CNN on COCO, 36 epochs, multi-scale. The drop path rate is a
# guess: .1 more than for S.
_base_ = [
    '_base_/models/cascade_mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance_ms_crop.py',
    '_base_/schedules/coco_3x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_b',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_b'),
    ),
    neck=dict(in_channels=[84, 168, 336, 504]),
)
