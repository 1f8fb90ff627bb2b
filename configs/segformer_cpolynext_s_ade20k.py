# CPolyNeXt-S with SegFormer's head on ADE20K. SegFormer's MiT-B2 reaches 46.5 mIoU with this
# recipe.
_base_ = [
    '_base_/models/segformer_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/segformer_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432]),
)
