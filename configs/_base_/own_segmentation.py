# UperNet on a data set of your own, for docs/own_data.md, which has the config that inherits from
# this file. Images keep their size in evaluation, and are scaled by 0.5 to 2 in training.
_base_ = [
    'models/upernet_polynext.py',
    'schedules/ade20k_160k.py',
    'default_runtime.py',
]
# registers OwnSegDataset: mmseg's BaseSegDataset with ignored_ids
custom_imports = dict(imports=['polynext_mm', 'polynext_mm.datasets.own'])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='Resize', scale_factor=factor, keep_ratio=True)]
            for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
        ],
    ),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='OwnSegDataset', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,  # images differ in size
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='OwnSegDataset', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=factor, keep_ratio=True)
                for factor in (0.75, 1.0, 1.25)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
# whole images; SyncBN, which mmengine makes BN on one device, comes from the model's file
model = dict(test_cfg=dict(_delete_=True, mode='whole'))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
