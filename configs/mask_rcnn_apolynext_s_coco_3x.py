# APolyNeXt-S with Mask R-CNN on COCO, 36 epochs, multi-scale. The drop path rate of .2 is that of
# mmdet's configs for Swin-T and Swin-S.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance_ms_crop.py',
    '_base_/schedules/coco_3x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_s',
        drop_path_rate=0.2,
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    neck=dict(in_channels=[72, 144, 288, 432]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
