# APolyNeXt-B with UperNet on ADE20K. No result is published; the drop path rate is that of ImageNet
# training (0.4) plus .05, the difference that the authors chose for S (0.25 and 0.3).
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_b',
        drop_path_rate=0.45,
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_b'),
    ),
    decode_head=dict(in_channels=[84, 168, 336, 504]),
    auxiliary_head=dict(in_channels=336),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
