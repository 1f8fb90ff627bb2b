# UperNet on Cityscapes as InternImage-T is trained, which reaches 82.6 mIoU (its released config):
# 160k iterations of 16 images, AdamW, lr 6e-5 for backbone and heads, weight decay .05, drop path
# .2. Which parameters do not decay, and bfloat16, are from the authors' recipe for ADE20K.
_base_ = 'ade20k_160k.py'
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(head_lr_mult=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
