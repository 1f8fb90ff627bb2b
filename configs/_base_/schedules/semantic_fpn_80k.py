# Semantic FPN on ADE20K as MogaNet-S is trained, which reaches 47.7 mIoU (its released config; the
# recipe goes back to PVT's): 80k iterations of 32 images, AdamW, lr 2e-4, weight decay 1e-4, drop
# path .1, no warm-up. Bfloat16 is from the authors' recipe for UperNet.
_base_ = 'ade20k_160k.py'
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=1e-4), paramwise_cfg=dict(head_lr_mult=1.0)
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000)]
auto_scale_lr = dict(base_batch_size=32)  # 4 GPUs x 8
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
