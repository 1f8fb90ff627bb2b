# What every config needs: PolyNeXt registered, checkpoints checked strictly, and logging. For
# TensorBoard: --cfg-options visualizer.vis_backends.0.type=TensorboardVisBackend
custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)
custom_hooks = [
    dict(type='CheckpointGuardHook', reset_mismatched_heads=False),
    dict(type='TrainingCheckHook'),
    dict(type='DataCheckHook'),
    # what a week-long training needs: docs/reliability.md
    dict(type='WorkDirHook'),
    dict(type='ReproducibilityHook'),
    dict(type='NonFiniteHook', patience=3),
    dict(type='InterruptHook'),
    dict(type='WatchdogHook', timeout=1800),
    # 'unchecked' or 'off': docs/performance.md
    dict(type='KernelCheckHook', kernels='checked'),
    # report/ in the work dir: curves, a table of the classes, pictures
    dict(type='ReportHook', pictures=8),
]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
log_level = 'INFO'
load_from = None
resume = False
