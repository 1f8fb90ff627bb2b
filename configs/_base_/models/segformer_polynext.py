# SegFormer's head of MLPs, with the 768 channels that the SegFormer paper gives to its MiT-B2,
# whose size is that of S, and to larger ones. Configs set arch, init_cfg and in_channels of the
# head.
default_scope = 'mmseg'
crop_size = (512, 512)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,  # after normalizing
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type='PolyNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.1, compile_cells=False
    ),
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
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
