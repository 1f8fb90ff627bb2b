# APolyNeXt-B with Mask R-CNN on COCO, 12 epochs. The drop path rate is a guess: that of MogaNet-S
# (.1), raised for the larger network.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='apolynext_b',
        drop_path_rate=0.2,
        grad_clip_norm=5.0,
        init_cfg=dict(type='Pretrained', checkpoint='polynext://apolynext_b'),
    ),
    neck=dict(in_channels=[84, 168, 336, 504]),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0, norm_type=2))
