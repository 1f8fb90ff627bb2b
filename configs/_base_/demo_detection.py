# A narrow ATSS from scratch in a few minutes on two cores, as `make demo-detection` trains it:
# float32, by iterations, on images of the size that they have. Configs set the data, arch, channels
# and schedule.
_base_ = 'own_detection.py'
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
    num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), batch_sampler=None
)
val_dataloader = dict(num_workers=0, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    neck=dict(out_channels=64, num_outs=3),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        norm_cfg=dict(type='GN', num_groups=16),
        # objects are 30 to 64 pixels across, and anchors 32, 64 and 128
        anchor_generator=dict(octave_base_scale=4, strides=[8, 16, 32]),
    ),
    test_cfg=dict(score_thr=0.01, nms=dict(iou_threshold=0.5)),  # scores stay low for a while
)
optim_wrapper = dict(
    dtype='float32',  # bfloat16 is faster only on CPUs with instructions for it
    clip_grad=dict(max_norm=5.0),
)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop')
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(by_epoch=False, save_best=None, max_keep_ckpts=-1)
)
log_processor = dict(window_size=10, by_epoch=False)
randomness = dict(seed=0)
