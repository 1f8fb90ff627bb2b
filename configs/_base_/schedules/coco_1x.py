# 12 epochs of COCO on 8 GPUs x 2 images. The optimizer is that of Mask R-CNN with MogaNet-S (46.6
# box AP, 42.2 mask AP): AdamW, lr 2e-4, weight decay .05. The steps after epochs 8 and 11 and the
# 500 iterations of warm-up are those of mmdet's 1x schedule. Nobody has measured it with PolyNeXt.
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='bfloat16',
    # bfloat16 would round boxes to 8 bits, so heads, box coding and losses stay float32
    modules=['backbone', 'neck'],
    # fused: one call for each parameter group, on CPUs too
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='PolyNeXtOptimWrapperConstructor',
    # as for ADE20K, but with the learning rate of the backbone in the heads too
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
