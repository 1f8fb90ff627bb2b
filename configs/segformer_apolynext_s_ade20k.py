# APolyNeXt-S with SegFormer's head on ADE20K. SegFormer's MiT-B2 reaches 46.5 mIoU with this
# recipe.
_base_ = [
    '_base_/models/segformer_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/segformer_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_s',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
