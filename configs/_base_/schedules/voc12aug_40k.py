# The authors' optimizer for ADE20K, for the 40k iterations of 16 images of mmseg's UperNet configs
# for Pascal VOC 2012 (ResNet-101: 77.4 mIoU, by SGD). No recipe with AdamW is published for a
# backbone of this size.
_base_ = 'ade20k_160k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=40000),
]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
