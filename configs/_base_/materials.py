# The sample in demo/materials, whose scenes `python demo/make_materials.py` makes: where they are,
# their classes, and the short CPolyNeXt that the demos train on them.
data_root = '{{ fileDirname }}/../../demo/materials/scenes/'
metainfo = dict(
    classes=('brick', 'grass', 'gravel', 'coins', 'galaxies', 'trees'),
    palette=[
        (200, 90, 70),
        (150, 200, 80),
        (160, 160, 160),
        (240, 190, 60),
        (50, 60, 150),
        (30, 110, 70),
    ],
)
arch = dict(
    widths=[24, 48, 96, 96],
    depths=(1, 1, 1, 1),
    stacks=(2, 2, 2, 2),
    mixers=('conv', 'conv', 'conv', 'conv'),
    conv_ratios=(1, 1, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
    coarse_sizes=(3, 5, 5, 5),
    downsampling=('sep3x3', 'sep3x3'),
    gate_init=(0.0, 0.0, -1.0, -2.0),
)
