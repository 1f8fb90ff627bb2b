# CPolyNeXt-S with UperNet on ADE20K. Published by the authors: 50.6 mIoU.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432]),
    auxiliary_head=dict(in_channels=288),
)
