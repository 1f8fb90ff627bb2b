# DINO for 12 epochs of COCO, as mmdet trains ResNet-50 (49.0 AP) and detrex Swin-T (51.3 AP): 8
# GPUs x 2 images, AdamW, lr 1e-4 and a tenth of that for the backbone, weight decay 1e-4, gradients
# clipped at norm .1, a step after epoch 11, no warm-up.
_base_ = 'coco_1x.py'
optim_wrapper = dict(
    optimizer=dict(lr=1e-5, weight_decay=1e-4),  # lr of the backbone
    paramwise_cfg=dict(head_lr_mult=10.0),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1)
]
