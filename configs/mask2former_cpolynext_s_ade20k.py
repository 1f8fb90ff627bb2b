# CPolyNeXt-S with Mask2Former on ADE20K. Swin-S reaches 51.2 mIoU with this recipe (mmseg).
_base_ = [
    '_base_/models/mask2former_polynext.py',
    '_base_/datasets/ade20k_mask2former.py',
    '_base_/schedules/mask2former_ade20k_160k.py',
    '_base_/default_runtime.py',
]
# mmdet has the parts of the head
custom_imports = dict(imports=['polynext_mm', 'mmdet.models'])
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 432]),
)
