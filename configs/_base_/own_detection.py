# ATSS on a data set of your own in COCO's format, for docs/own_data.md, which has the config
# that inherits from this file.
_base_ = [
    'models/atss_polynext.py',
    'schedules/coco_1x.py',
    'detection_runtime.py',
]
# images are resized to fit into it, longer side 1333, shorter side 800
resize = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
boxes = dict(type='LoadAnnotations', with_bbox=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    boxes,
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    boxes,
    dict(type='PackDetInputs', meta_keys=keys),
]
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
packed = dict(type='PackDetInputs', meta_keys=(*keys, 'flip', 'flip_direction'))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[[resize], flips, [boxes], [packed]]),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    # images without objects are trained on too: they teach what is none
    dataset=dict(
        type='CocoDataset',
        pipeline=train_pipeline,
        filter_cfg=dict(filter_empty_gt=False, min_size=32),
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric='bbox', classwise=False)
test_evaluator = val_evaluator
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='coco/bbox_mAP'))
