# The sample in demo/materials and the arch that is trained on it: a short CPolyNeXt, for a few
# minutes on two cores. docs/from_scratch.md says which of its settings matter.
data_root = '{{ fileDirname }}/../../demo/materials/'
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
widths = [24, 48, 96, 96]
arch = dict(
    widths=widths,
    depths=(1, 1, 1, 1),
    stacks=(2, 2, 2, 2),
    mixers=('conv', 'conv', 'conv', 'conv'),
    conv_ratios=(1, 1, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
    coarse_sizes=(3, 5, 5, 5),
    downsampling=('sep3x3', 'sep3x3'),
    gate_init=(0.0, 0.0, -1.0, -2.0),
)
