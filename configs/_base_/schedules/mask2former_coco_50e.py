# Mask2Former for 50 epochs of COCO as mmdet trains Swin-S, which reaches 46.1 mask AP: 368750
# iterations of 16 images (8 GPUs x 2), AdamW, lr 1e-4 and a tenth of that for the backbone, weight
# decay .05 but for norms and embeddings, gradients clipped at norm .01, steps after 8/9 and 26/27
# of the iterations.
_base_ = 'coco_1x.py'
max_iters = 368750
interval = 5000
optim_wrapper = dict(
    modules=['backbone'],
    optimizer=dict(lr=1e-5),  # of the backbone
    paramwise_cfg=dict(no_decay='paper', embedding_decay=False, head_lr_mult=10.0),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
param_scheduler = [
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=max_iters,
        milestones=[327778, 355092],
        gamma=0.1,
    )
]
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=interval
)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=interval, max_keep_ckpts=3),
)
log_processor = dict(by_epoch=False)
