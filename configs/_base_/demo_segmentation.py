# UperNet from scratch in a few minutes on two cores, as `make demo` trains it: float32, on images
# that are small enough to be evaluated whole. Configs set the data, arch, channels and schedule.
_base_ = 'own_segmentation.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
optim_wrapper = dict(
    dtype='float32',  # bfloat16 is faster only on CPUs with instructions for it
    paramwise_cfg=dict(head_lr_mult=1.0),
    clip_grad=dict(max_norm=5.0),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(save_best=None, max_keep_ckpts=-1))
randomness = dict(seed=0)
