# A short CPolyNeXt with a narrow UperNet, from scratch, on the sample in demo/materials: what
# `make demo` trains. The settings are chosen for a few minutes on two cores and are no recipe for
# more; docs/from_scratch.md says which of them matter.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
data_root = '{{ fileDirname }}/../demo/materials'
metainfo = dict(
    classes=('brick', 'grass', 'gravel', 'coins', 'galaxies', 'trees'),
    palette=[
        [200, 90, 70],
        [150, 200, 80],
        [160, 160, 160],
        [240, 190, 60],
        [50, 60, 150],
        [30, 110, 70],
    ],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(96, 96)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=False,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
# settings were chosen on the tuning scenes; the test scenes are for the figure alone
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=False,
        data_root=data_root,
        data_prefix=dict(img_path='images/tuning', seg_map_path='annotations/tuning'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        reduce_zero_label=False,
        data_root=data_root,
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

num_classes = len(metainfo['classes'])
widths = [24, 48, 96, 96]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        arch=dict(
            widths=widths,
            depths=(1, 1, 1, 1),
            stacks=(2, 2, 2, 2),
            mixers=('conv', 'conv', 'conv', 'conv'),
            conv_ratios=(1, 1, 1, 1),
            mlp_ratios=(2, 2, 2, 2),
            coarse_sizes=(3, 5, 5, 5),
            downsampling=('sep3x3', 'sep3x3'),
            gate_init=(0.0, 0.0, -1.0, -2.0),
        ),
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=widths,
        channels=32,
        dropout_ratio=0.0,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(
        in_channels=widths[2], channels=32, num_classes=num_classes, norm_cfg=norm_cfg
    ),
    test_cfg=dict(_delete_=True, mode='whole'),
)

max_iters = 1600
optim_wrapper = dict(
    dtype='float32',  # bfloat16 is faster only on CPUs with instructions for it
    optimizer=dict(lr=1e-2),
    paramwise_cfg=dict(head_lr_mult=1.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=400)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters, save_best=None))
randomness = dict(seed=0)
