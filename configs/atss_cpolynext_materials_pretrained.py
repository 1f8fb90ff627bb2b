# The same, started from the backbone of the segmentor that `make demo` trains on the labels of the
# training scenes. Run `make demo` first: it takes 6 minutes and leaves the checkpoint below. Or set
# model.backbone.init_cfg.checkpoint to another one of upernet_cpolynext_materials.py.
_base_ = 'atss_cpolynext_materials.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/upernet_cpolynext_materials/iter_1600.pth',
        ),
    ),
)
