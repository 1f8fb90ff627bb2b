# CPolyNeXt-B with UperNet on ADE20K. No result is published; the drop path rate is that of ImageNet
# training (0.3) plus .1, the difference that the authors chose for S (0.2 and 0.3).
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_b',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_b'),
    ),
    decode_head=dict(in_channels=[84, 168, 336, 504]),
    auxiliary_head=dict(in_channels=336),
)
