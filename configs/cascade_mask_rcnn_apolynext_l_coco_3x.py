# APolyNeXt-L with Cascade Mask R-CNN on COCO, 36 epochs, multi-scale. The drop path rate is a
# guess: .1 more than for B.
_base_ = [
    '_base_/models/cascade_mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance_ms_crop.py',
    '_base_/schedules/coco_3x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_l',
        drop_path_rate=0.4,
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_l'),
    ),
    neck=dict(in_channels=[96, 192, 384, 576]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
