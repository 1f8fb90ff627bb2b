# The sample in demo/materials: where it is, and its classes.
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
