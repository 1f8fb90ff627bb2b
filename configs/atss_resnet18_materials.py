# The same with mmdet's ResNet-18 as backbone: one of the two that `make demo-detection` compares
# with.
_base_ = 'atss_cpolynext_materials.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        frozen_stages=-1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None)
