# CPolyNeXt-T with a narrow UperNet, from scratch, on the tiles in demo/landcover: an example with
# ids that count from 1, for trying settings and tools on two cores.
_base_ = '_base_/demo_segmentation.py'
data_root = '{{ fileDirname }}/../demo/landcover'
metainfo = dict(
    classes=('water', 'forest', 'open', 'crop', 'snow', 'barren'),
    palette=[
        (40, 70, 160),
        (20, 110, 40),
        (170, 200, 90),
        (235, 180, 60),
        (240, 245, 250),
        (190, 160, 130),
    ],
)
dataset = dict(data_root=data_root, metainfo=metainfo, reduce_zero_label=True)
# tiles are 64x64; enlarged, a position at stride 4 covers 2x2 of their pixels
enlarge = dict(type='Resize', scale=(128, 128))
crop_size = (64, 64)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    enlarge,
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    enlarge,
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_prefix = dict(img_path='images/training', seg_map_path='annotations/training')
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(dataset, data_prefix=train_prefix, pipeline=train_pipeline),
)
val_prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(dataset, data_prefix=val_prefix, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

num_classes = len(metainfo['classes'])
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch='cpolynext_t'),
    decode_head=dict(in_channels=[48, 96, 192, 288], channels=64, num_classes=num_classes),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=num_classes),
)

max_iters = 700
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=350)
default_hooks = dict(checkpoint=dict(interval=max_iters))
