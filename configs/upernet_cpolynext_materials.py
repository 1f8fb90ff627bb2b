# A short CPolyNeXt with a narrow UperNet, from scratch, on the sample in demo/materials: what
# `make demo` trains. The settings are chosen for a few minutes on two cores and are no recipe for
# more; docs/from_scratch.md says which of them matter.
_base_ = ['_base_/demo_segmentation.py', '_base_/materials.py']
crop_size = (96, 96)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
dataset = dict(data_root=_base_.data_root, metainfo=_base_.metainfo)
train_prefix = dict(img_path='images/training', seg_map_path='annotations/training')
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(dataset, data_prefix=train_prefix, pipeline=train_pipeline),
)
# settings were chosen on the tuning scenes; the test scenes are for the figure alone
val_prefix = dict(img_path='images/tuning', seg_map_path='annotations/tuning')
val_dataloader = dict(batch_size=10, num_workers=0, dataset=dict(dataset, data_prefix=val_prefix))
test_prefix = dict(img_path='images/test', seg_map_path='annotations/test')
test_dataloader = dict(batch_size=10, num_workers=0, dataset=dict(dataset, data_prefix=test_prefix))

num_classes = len(_base_.metainfo.classes)
widths = _base_.arch.widths
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch=_base_.arch),
    decode_head=dict(in_channels=widths, channels=32, dropout_ratio=0.0, num_classes=num_classes),
    auxiliary_head=dict(in_channels=widths[2], channels=32, num_classes=num_classes),
)

max_iters = 1600
optim_wrapper = dict(optimizer=dict(lr=1e-2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=max_iters))
