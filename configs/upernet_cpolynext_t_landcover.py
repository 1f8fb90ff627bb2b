# CPolyNeXt-T with a narrow UperNet, from scratch, on the sample in demo/landcover: an example with
# ids that count from 1. The settings are chosen for a few minutes on two cores and are no recipe
# for more.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
data_root = '{{ fileDirname }}/../demo/landcover'
metainfo = dict(
    classes=('water', 'forest', 'open', 'crop', 'snow', 'barren'),
    palette=[
        [40, 70, 160],
        [20, 110, 40],
        [170, 200, 90],
        [235, 180, 60],
        [240, 245, 250],
        [190, 160, 130],
    ],
)
# tiles are 64x64; enlarged, a position at stride 4 covers 2x2 of their pixels
enlarge = dict(type='Resize', scale=(128, 128))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    enlarge,
    dict(type='RandomCrop', crop_size=(64, 64)),
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
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

num_classes = len(metainfo['classes'])
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch='cpolynext_t', drop_path_rate=0.0, init_cfg=None),
    decode_head=dict(
        in_channels=[48, 96, 192, 288], channels=64, num_classes=num_classes, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=num_classes, norm_cfg=norm_cfg),
    test_cfg=dict(_delete_=True, mode='whole'),
)

max_iters = 700
optim_wrapper = dict(
    dtype='float32',  # bfloat16 is faster only on CPUs with instructions for it
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(head_lr_mult=1.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=350)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters, save_best=None))
randomness = dict(seed=0)
