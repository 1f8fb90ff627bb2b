# CAFormer-S18 with Mask R-CNN on COCO, 12 epochs, the peer of APolyNeXt-S. The recipe is that of
# APolyNeXt-S, without its clips. Nobody has published this one.
_base_ = [
    '_base_/models/mask_rcnn_polynext.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/coco_1x.py',
    '_base_/detection_runtime.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='MetaFormer',
        arch='caformer_s18',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,  # as of PolyNeXt's: MogaNet-S, 1x
        init_cfg=dict(type='Pretrained', checkpoint='timm://caformer_s18.sail_in1k'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
