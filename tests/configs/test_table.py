"""The table in configs/README.md describes every config, correctly."""

import re

import pytest

from helpers import ROOT, Config
from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED

HEADS = {
    'UPerHead': 'UperNet',
    'FPNHead': 'Semantic FPN',
    'SegformerHead': 'SegFormer',
    'Mask2FormerHead': 'Mask2Former',
    'MaskRCNN': 'Mask R-CNN',
    'CascadeRCNN': 'Cascade Mask R-CNN',
    'RetinaNet': 'RetinaNet',
    'ATSS': 'ATSS',
    'DINO': 'DINO',
    'Mask2Former': 'Mask2Former',
}
DATA = {
    'ade20k': 'ADE20K',
    'cityscapes': 'Cityscapes',
    'voc12aug': 'Pascal VOC 2012 aug',
    'pascal_context': 'PASCAL Context 59',
    'coco': 'COCO 2017',
    'landcover': 'demo/landcover',
    'treecrowns': 'demo/treecrowns',
    'materials': 'demo/materials',
}
ROWS = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in (ROOT / 'configs' / 'README.md').read_text().splitlines()
    if line.startswith('| [')
]


def schedule(cfg: Config) -> str:
    epochs, iterations = (cfg.train_cfg.get(f'max_{unit}') for unit in ('epochs', 'iters'))
    if epochs is not None:
        return f'{epochs} epochs'
    return f'{iterations} iterations'.replace('000 ', 'k ')


def test_every_config_is_in_the_table_once():
    linked = [re.fullmatch(r'\[(.+)\]\((.+)\)', row[0]).groups() for row in ROWS]
    assert all(file == f'{name}.py' for name, file in linked)
    configs = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
    assert sorted(name for name, _ in linked) == configs


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
def test_a_row_says_what_the_config_is(row):
    link, backbone, head, data, said_schedule, published, measured = row
    name = re.match(r'\[(.+)\]', link)[1]
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    arch = cfg.model.backbone.get('arch')
    norm = cfg.model.backbone.get('norm', 'ln')
    if isinstance(arch, str):
        assert backbone.removesuffix(', bn').lower().replace('-', '') == arch.replace('_', '')
    else:  # a short arch of the config's own, or another package's backbone
        assert name.split('_')[1] in backbone.lower().replace('-', '')
    assert backbone.endswith(', bn') == (norm == 'bn')
    assert head == HEADS[cfg.model.get('decode_head', cfg.model).type]
    assert data == next(said for key, said in DATA.items() if key in name)
    assert said_schedule.partition(',')[0] == schedule(cfg)
    if isinstance(arch, str) and arch in ARCHS and head == 'UperNet':
        kind = (data.lower(), arch)
        files = [
            file for file in PUBLISHED.values() if (file.holds, file.arch) == kind and norm == 'ln'
        ]
        figures = [f'{file.figure} mIoU' for file in files]
        assert published == (figures[0] if figures else 'none')
    elif isinstance(arch, str) and arch in ARCHS:
        assert published == 'none'
    assert measured
