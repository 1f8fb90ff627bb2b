# APolyNeXt-S with Mask R-CNN on COCO, 12 epochs. MogaNet-S reaches 46.6 box AP and 42.2 mask AP
# with this recipe.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_s',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    neck=dict(in_channels=[72, 144, 288, 432]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
