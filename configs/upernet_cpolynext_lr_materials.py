# CPolyNeXt-LR, the low-resolution network, with a narrow UperNet over its three outputs of strides
# 1, 2 and 4, from scratch, on the sample in demo/materials: an example for small images. Images are
# normalized as the network's published files expect, so that a training can start from one.
_base_ = 'upernet_cpolynext_materials.py'
crop_size = (32, 32)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(
    data_preprocessor=dict(
        size=crop_size, mean=[125.307, 122.95, 113.865], std=[62.993, 62.089, 66.705]
    ),
    backbone=dict(arch='cpolynext_lr', out_indices=(0, 1, 2)),
    decode_head=dict(in_channels=[72, 144, 288], in_index=[0, 1, 2], channels=64),
    auxiliary_head=dict(in_channels=288, in_index=2, channels=64),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
