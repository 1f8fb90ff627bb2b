# 12 epochs of COCO, 8 GPUs x 2 images. Optimizer of Mask R-CNN with MogaNet-S (46.6 box AP, 42.2 mask AP
# after 12 epochs: nobody has measured ours yet): AdamW, lr 2e-4, weight decay .05. Steps after epochs 8
# and 11 and 500 iterations of warm-up: mmdet's 1x schedule.
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='bfloat16',
    # boxes in bfloat16 would be rounded to 8 bits: heads, box coding and losses stay float32
    modules=['backbone', 'neck'],
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='PolyNeXtOptimWrapperConstructor',
    # as for ADE20K, but the heads learn as fast as the backbone
    paramwise_cfg=dict(no_decay='released', head_lr_mult=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='AtomicCheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
