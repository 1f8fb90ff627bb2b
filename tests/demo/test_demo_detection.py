"""demo/detection.py goes from training to the table and the pictures."""

import re

import pytest

from helpers import ROOT, python


@pytest.mark.slow
def test_a_quick_look(tmp_path):
    printed = python(ROOT / 'demo' / 'detection.py', '--seconds', 2, '--work-dir', tmp_path)
    rows = re.findall(
        r'^(CPolyNeXt-T|ResNet-18) +(\d+) +\d+ +([\d.]+) +([\d.]+)$', printed, flags=re.MULTILINE
    )
    assert [row[0] for row in rows] == ['CPolyNeXt-T', 'ResNet-18']
    assert all(int(iterations) >= 2 for _, iterations, *_ in rows)
    for config in ('atss_cpolynext_t_treecrowns', 'atss_resnet18_treecrowns'):
        assert len(list((tmp_path / config / 'pictures').glob('*.jpg'))) == 11
