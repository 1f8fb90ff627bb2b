# CPolyNeXt-S with ATSS on COCO, 12 epochs. The optimizer is that of RetinaNet with MogaNet-S
# (AdamW, lr 1e-4, weight decay .05, drop path .1). For ATSS only longer trainings are published: 36
# epochs, multi-scale, give 47.2 AP with Swin-T and 49.9 AP with PVT v2-B2 (PVT v2 paper).
_base_ = [
    '_base_/models/atss_polynext.py',
    '_base_/datasets/coco_detection.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        arch='cpolynext_s',
        init_cfg=dict(type='Pretrained', checkpoint='polynext://cpolynext_s'),
    ),
    neck=dict(in_channels=[144, 288, 432]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
