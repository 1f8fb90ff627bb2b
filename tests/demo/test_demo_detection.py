"""demo/detection.py goes from training to the table and the pictures."""

import re

import pytest

from helpers import ROOT, python


@pytest.mark.slow
def test_a_quick_look(tmp_path):
    printed = python(ROOT / 'demo' / 'detection.py', '--seconds', 2, '--work-dir', tmp_path)
    rows = re.findall(
        r'^(CPolyNeXt, short|ConvNeXt-Atto|ResNet-18) +(\d+) +\d+ +([\d.]+) +([\d.]+)$',
        printed,
        flags=re.MULTILINE,
    )
    assert [row[0] for row in rows] == ['CPolyNeXt, short', 'ConvNeXt-Atto', 'ResNet-18']
    assert all(int(iterations) >= 2 for _, iterations, *_ in rows)
    for config in (
        'atss_cpolynext_materials',
        'atss_convnext_atto_materials',
        'atss_resnet18_materials',
    ):
        assert len(list((tmp_path / config / 'pictures').glob('*.jpg'))) == 100
