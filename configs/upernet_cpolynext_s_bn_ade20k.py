# CPolyNeXt-S, fully polynomial, with UperNet on ADE20K: the recipe of the network with LN. No
# result is published. norm_size is the crop, to which the first step resizes the statistics of the
# ImageNet checkpoint, which are for 224x224. Without it, training in several processes keeps them
# there.
_base_ = 'upernet_cpolynext_s_ade20k.py'
model = dict(
    backbone=dict(
        norm='bn',
        norm_size=(512, 512),
        init_cfg=dict(checkpoint='polynext://cpolynext_s_bn'),
    )
)
