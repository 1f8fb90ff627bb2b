# What mmseg's EncoderDecoder shares whatever its head: preprocessing and backbone. Configs set arch
# and init_cfg of the backbone.
default_scope = 'mmseg'
crop_size = (512, 512)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,  # after normalizing
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type='PolyNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.3, compile_cells=False
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
