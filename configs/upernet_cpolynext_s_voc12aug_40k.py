# CPolyNeXt-S with UperNet on Pascal VOC 2012 with additional labels, 40k iterations.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/pascal_voc12_aug.py',
    '_base_/schedules/voc12aug_40k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432], num_classes=21),
    auxiliary_head=dict(in_channels=288, num_classes=21),
)
