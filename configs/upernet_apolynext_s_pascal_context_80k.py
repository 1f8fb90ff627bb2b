# APolyNeXt-S with UperNet on the 59 classes of PASCAL Context, 80k iterations.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/pascal_context_59.py',
    '_base_/schedules/pascal_context_80k.py',
    '_base_/default_runtime.py',
]
crop_size = (480, 480)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch='apolynext_s',
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432], num_classes=59),
    auxiliary_head=dict(in_channels=288, num_classes=59),
    test_cfg=dict(crop_size=crop_size, stride=(320, 320)),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
