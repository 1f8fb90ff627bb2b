# SegFormer's head of MLPs, with the 768 channels that the SegFormer paper gives to its MiT-B2,
# whose size is that of S, and to larger ones. Configs set arch, init_cfg and in_channels of the
# head.
_base_ = 'encoder_decoder_polynext.py'
model = dict(
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(
        type='SegformerHead',
        in_index=[0, 1, 2, 3],
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
