# mmseg's Mask2Former, whose head is mmdet's. Configs set arch, init_cfg, in_channels of the head,
# and custom_imports with mmdet.models.
_base_ = ['encoder_decoder_polynext.py', 'mask2former_head.py']
num_classes = 150
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
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
)
