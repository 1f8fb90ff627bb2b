# CAFormer-S18 with UperNet on ADE20K, a peer of APolyNeXt-S: published 48.9 mIoU (the authors of
# "MetaFormer Baselines for Vision", arXiv 2210.13452, and the table of PolyNeXt's paper).
# Published are batch 16 and 160k iterations; all else is the recipe of PolyNeXt's configs, so that the
# backbone alone differs. Drop path: .15 on ImageNet, .05 more here, as the authors added for
# APolyNeXt-S.
_base_ = [
    '_base_/models/upernet_polynext.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='MetaFormer',
        arch='caformer_s18',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='timm://caformer_s18.sail_in1k'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
