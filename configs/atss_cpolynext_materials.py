# The short CPolyNeXt of upernet_cpolynext_materials.py with a narrow ATSS (a RetinaNet that chooses
# its positive anchors by statistics of their overlaps), from scratch, on the sample in
# demo/materials: what `make demo-detection` trains. The settings are chosen for a few minutes on
# two cores and are no recipe for more.
_base_ = ['_base_/demo_detection.py', '_base_/materials.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
data_root = _base_.data_root
dataset = dict(data_root=data_root, metainfo=_base_.metainfo)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        dataset,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training/'),
        pipeline=train_pipeline,
    ),
)
# settings were chosen on the tuning scenes; the test scenes are for the figure alone
tuning_file, test_file = 'annotations/instances_tuning.json', 'annotations/instances_test.json'
val_dataloader = dict(
    batch_size=10,
    dataset=dict(dataset, ann_file=tuning_file, data_prefix=dict(img='images/tuning/')),
)
test_dataloader = dict(
    batch_size=10,
    dataset=dict(dataset, ann_file=test_file, data_prefix=dict(img='images/test/')),
)
val_evaluator = dict(ann_file=data_root + tuning_file)
test_evaluator = dict(ann_file=data_root + test_file)

model = dict(
    backbone=dict(arch=_base_.arch),
    neck=dict(in_channels=_base_.widths[1:]),
    bbox_head=dict(num_classes=len(_base_.metainfo.classes), stacked_convs=1),
)

max_iters = 800
optim_wrapper = dict(optimizer=dict(lr=6e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters), visualization=dict(score_thr=0.3))
