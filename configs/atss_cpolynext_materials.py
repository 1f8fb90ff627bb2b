# A short CPolyNeXt with a narrow ATSS (a RetinaNet that chooses its positive anchors by statistics
# of their overlaps), from scratch, on the sample in demo/materials: one of those that
# `make demo-detection` trains. The settings are chosen for a few minutes on two cores and are no
# recipe for more; docs/from_scratch.md says which of them matter.
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

norm_cfg = dict(type='BN', requires_grad=True)
# pieces are 40 to 64 pixels across: strides 4 to 16 show their texture
widths = _base_.arch.widths[:3]
model = dict(
    # the segmentor's arch, so that its weights fit; the fourth stage is not computed
    backbone=dict(arch=_base_.arch, out_indices=(0, 1, 2)),
    neck=dict(in_channels=widths, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=len(_base_.metainfo.classes),
        stacked_convs=1,
        norm_cfg=dict(_delete_=True, **norm_cfg),
        anchor_generator=dict(octave_base_scale=8, strides=[4, 8, 16]),
    ),
)

max_iters = 800
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
find_unused_parameters = True  # DistributedDataParallel would stop at those of the fourth stage
default_hooks = dict(checkpoint=dict(interval=max_iters), visualization=dict(score_thr=0.3))
