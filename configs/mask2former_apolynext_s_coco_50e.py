# APolyNeXt-S with Mask2Former on COCO, instance segmentation, 50 epochs. Swin-S reaches 46.1 mask
# AP with this recipe (mmdet).
_base_ = [
    '_base_/models/mask2former_instance_polynext.py',
    '_base_/datasets/coco_instance_lsj.py',
    '_base_/schedules/mask2former_coco_50e.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_s',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    panoptic_head=dict(in_channels=[72, 144, 288, 432]),
)
