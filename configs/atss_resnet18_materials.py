# The same with mmdet's ResNet-18 as backbone: one of the two that `make demo-detection` compares
# with.
_base_ = 'atss_cpolynext_materials.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        frozen_stages=-1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256]),
)
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None)
