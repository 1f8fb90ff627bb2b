# 36 epochs of COCO on 8 GPUs x 2 images. The optimizer is that of the Swin paper (AdamW, lr 1e-4,
# weight decay .05), which HorNet-T and MogaNet-S also use for Cascade Mask R-CNN (51.7 box AP, 44.8
# to 45.1 mask AP). The steps after epochs 27 and 33 and the 1000 iterations of warm-up are those of
# mmdet's configs for Swin and ConvNeXt. ConvNeXt's lr of 2e-4 goes with its layer-wise decay, so
# neither is used here.
_base_ = 'coco_1x.py'
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)
