# The authors' ADE20K recipe from their released code: 160k iterations on 2 GPUs x 8 images.
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    dtype='bfloat16',
    # fused: one call for each parameter group, on CPUs too
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='PolyNeXtOptimWrapperConstructor',
    # no_decay='paper' exempts all norms from decay, as the paper says
    paramwise_cfg=dict(no_decay='released', head_lr_mult=10.0),
)
# lr(i) = 1e-4 (1 - i / 160000), times 1 - (1 - i / 1500)(1 - 1e-6) while i < 1500
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=16000, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=False)
