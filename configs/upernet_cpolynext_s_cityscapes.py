# CPolyNeXt-S with UperNet on Cityscapes. InternImage-T reaches 82.6 mIoU with this recipe.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/cityscapes.py',
    '_base_/schedules/cityscapes_160k.py',
    '_base_/default_runtime.py',
]
crop_size = (512, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch='cpolynext_s',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432], num_classes=19),
    auxiliary_head=dict(in_channels=288, num_classes=19),
    test_cfg=dict(_delete_=True, mode='whole'),
)
