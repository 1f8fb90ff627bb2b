# The same with timm's ConvNeXt-Atto as backbone: one of the two that `make demo-detection` compares
# with, and the one of PolyNeXt's own kind, with layer norms and depthwise convolutions.
_base_ = 'atss_cpolynext_materials.py'
custom_imports = dict(imports=['polynext_mm', 'mmseg.models'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmseg.TIMMBackbone',
        model_name='convnext_atto',
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2),
    ),
    neck=dict(in_channels=[40, 80, 160]),
)
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None)
