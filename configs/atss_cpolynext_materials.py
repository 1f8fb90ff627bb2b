# The short CPolyNeXt of upernet_cpolynext_materials.py with a narrow ATSS (a RetinaNet that chooses
# its positive anchors by statistics of their overlaps), from scratch, on the sample in
# demo/materials: what `make demo-detection` trains. The settings are chosen for a few minutes on
# two cores and are no recipe for more.
_base_ = [
    '_base_/models/retinanet_polynext.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
data_root = '{{ fileDirname }}/../demo/materials/'
metainfo = dict(
    classes=('brick', 'grass', 'gravel', 'coins', 'galaxies', 'trees'),
    palette=[
        (200, 90, 70),
        (150, 200, 80),
        (160, 160, 160),
        (240, 190, 60),
        (50, 60, 150),
        (30, 110, 70),
    ],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training/'),
        pipeline=train_pipeline,
    ),
)
# settings were chosen on the tuning scenes; the test scenes are for the figure alone
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_tuning.json',
        data_prefix=dict(img='images/tuning/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/instances_test.json',
        data_prefix=dict(img='images/test/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/instances_tuning.json', metric='bbox'
)
test_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/instances_test.json', metric='bbox'
)

widths = [24, 48, 96, 96]
model = dict(
    type='ATSS',
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
    neck=dict(in_channels=widths[1:], out_channels=64, num_outs=3),
    bbox_head=dict(
        _delete_=True,
        type='ATSSHead',
        num_classes=len(metainfo['classes']),
        in_channels=64,
        stacked_convs=1,
        feat_channels=64,
        norm_cfg=dict(type='GN', num_groups=16),
        # pieces are 40 to 64 pixels across, and anchors 32, 64 and 128
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type='ATSSAssigner', topk=9),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(score_thr=0.01),  # scores stay low in a short training
)

max_iters = 800
optim_wrapper = dict(
    dtype='float32',  # bfloat16 is faster only on CPUs with instructions for it
    optimizer=dict(lr=6e-3),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters
)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters),
    visualization=dict(score_thr=0.3),
)
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
