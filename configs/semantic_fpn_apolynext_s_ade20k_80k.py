# APolyNeXt-S with Semantic FPN on ADE20K, 80k iterations. MogaNet-S reaches 47.7 mIoU with this
# recipe.
_base_ = [
    '_base_/models/fpn_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/semantic_fpn_80k.py',
    '_base_/default_runtime.py',
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
