# Mask2Former on ADE20K as mmseg trains Swin-S, which reaches 51.2 mIoU: 160k iterations of 16
# images, AdamW, lr 1e-4 and a tenth of that for the backbone, weight decay .05 but for norms and
# embeddings, gradients clipped at norm .01.
_base_ = 'ade20k_160k.py'
optim_wrapper = dict(
    # deformable attention has no bfloat16, and matching and losses are mmdet's in float32
    modules=['backbone'],
    optimizer=dict(lr=1e-5),  # of the backbone
    paramwise_cfg=dict(no_decay='paper', embedding_decay=False, head_lr_mult=10.0),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=160000)]
train_cfg = dict(val_interval=5000)
default_hooks = dict(checkpoint=dict(interval=5000))
