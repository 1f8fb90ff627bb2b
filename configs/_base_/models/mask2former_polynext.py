# mmseg's Mask2Former, whose head is mmdet's. Configs set arch, init_cfg, in_channels of the head,
# and custom_imports with mmdet.models.
_base_ = 'mask2former_head.py'
default_scope = 'mmseg'
num_classes = 150
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
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(
        type='PolyNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.3, compile_cells=False
    ),
    decode_head=dict(
        **_base_.mask2former_head,
        num_classes=num_classes,
        align_corners=False,
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=2.0,
            reduction='mean',
            class_weight=[1.0] * num_classes + [0.1],  # the last is: no object
        ),
        train_cfg=_base_.mask2former_train_cfg,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
