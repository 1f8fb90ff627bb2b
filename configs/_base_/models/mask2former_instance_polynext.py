# mmdet's Mask2Former for instance segmentation. Configs set arch, init_cfg and in_channels of the
# head.
_base_ = 'mask2former_head.py'
default_scope = 'mmdet'
num_classes = 80
model = dict(
    type='Mask2Former',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        mask_pad_value=0,
        pad_seg=False,
        pad_size_divisor=32,
        # images and masks of training are crops, of this size or smaller
        batch_augments=[
            dict(
                type='BatchFixedSizePad',
                size=(1024, 1024),
                img_pad_value=0,
                pad_mask=True,
                mask_pad_value=0,
                pad_seg=False,
            )
        ],
    ),
    backbone=dict(
        type='PolyNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.3, compile_cells=False
    ),
    panoptic_head=dict(
        **_base_.mask2former_head,
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=2.0,
            reduction='mean',
            class_weight=[1.0] * num_classes + [0.1],  # the last is: no object
        ),
    ),
    panoptic_fusion_head=dict(
        type='MaskFormerFusionHead',
        num_things_classes=num_classes,
        num_stuff_classes=0,
        loss_panoptic=None,
    ),
    train_cfg=_base_.mask2former_train_cfg,
    test_cfg=dict(
        panoptic_on=False,
        semantic_on=False,
        instance_on=True,
        max_per_image=100,
        iou_thr=0.8,
        filter_low_score=True,
    ),
)
