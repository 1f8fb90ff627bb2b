# SegNeXt's training on PASCAL Context (its paper): 80k iterations of 16 images, AdamW, lr 6e-5 and
# ten times that for the heads, weight decay .01 but for norms. Bfloat16 is from the authors' recipe
# for ADE20K.
_base_ = 'ade20k_160k.py'
optim_wrapper = dict(
    optimizer=dict(lr=6e-5, weight_decay=0.01), paramwise_cfg=dict(no_decay='paper')
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
