# ConvFormer-S18 with UperNet on ADE20K, the peer of CPolyNeXt-S. Published: 48.6 mIoU, in the table
# of PolyNeXt's paper, with UperNet, batch 16 and 160k iterations. No config of that run is public:
# all else is the recipe of CPolyNeXt-S, so that only the backbone differs. The drop
# path rate is that of ImageNet, .2, and .1 more, as for CPolyNeXt-S.
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
        arch='convformer_s18',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='timm://convformer_s18.sail_in1k'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
