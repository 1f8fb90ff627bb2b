# CPolyNeXt-S with Semantic FPN on ADE20K, 80k iterations. MogaNet-S reaches 47.7 mIoU with this
# recipe.
_base_ = [
    '_base_/models/fpn_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/semantic_fpn_80k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    neck=dict(in_channels=[72, 144, 288, 432]),
)
