# CPolyNeXt-T, fully polynomial, with UperNet on ADE20K: the recipe of the network with LN. Nobody has
# published a figure. norm_size is the crop: the statistics of the ImageNet file, for 224x224, are resized
# to it at the first step. Leave it out, and training in several processes keeps them at 224x224.
_base_ = 'upernet_cpolynext_t_ade20k.py'
model = dict(
    backbone=dict(
        norm='bn',
        norm_size=(512, 512),
        init_cfg=dict(
            checkpoint='https://huggingface.co/JJWCactus/PolyNeXt/resolve/main/cpolynext_t_bn.pt'
        ),
    )
)
