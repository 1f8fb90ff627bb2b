# Semantic FPN, with mmseg's usual 256 channels in the FPN and 128 in the head. Configs set arch,
# init_cfg and in_channels of the neck.
_base_ = 'encoder_decoder_polynext.py'
model = dict(
    backbone=dict(drop_path_rate=0.1),
    neck=dict(type='FPN', out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
