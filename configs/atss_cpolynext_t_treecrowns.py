# CPolyNeXt-T with a narrow ATSS (a RetinaNet that chooses its positive anchors by statistics of
# their overlaps), from scratch, on the sample in demo/treecrowns: an example of data in COCO's
# format. The settings are chosen for a few minutes on two cores and are no recipe for more.
_base_ = '_base_/demo_detection.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    # in the validation tiles the light differs and trees are closer together
    dict(type='RandomResize', scale=(400, 400), ratio_range=(0.7, 1.3), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(192, 192), allow_negative_crop=True),
    dict(type='PhotoMetricDistortion'),
    # seen from above, trees have no orientation
    dict(
        type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
    ),
    dict(type='PackDetInputs'),
]
data_root = '{{ fileDirname }}/../demo/treecrowns/'
metainfo = dict(classes=('tree',), palette=[(250, 220, 60)])
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    dataset=dict(
        dataset,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_file = 'annotations/instances_val.json'
val_dataloader = dict(dataset=dict(dataset, ann_file=val_file, data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_file)
test_evaluator = val_evaluator

model = dict(
    backbone=dict(arch='cpolynext_t'),
    neck=dict(in_channels=[96, 192, 288]),
    bbox_head=dict(num_classes=1, stacked_convs=2),
)

max_iters = 600
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters), visualization=dict(score_thr=0.2))
