"""demo/detection.py goes from training to the table and the pictures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_quick_look(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'demo' / 'detection.py'),
            '--seconds',
            '2',
            '--work-dir',
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = re.findall(
        r'^(CPolyNeXt-T|ResNet-18) +(\d+) +\d+ +([\d.]+) +([\d.]+)$',
        result.stdout,
        flags=re.MULTILINE,
    )
    assert [row[0] for row in rows] == ['CPolyNeXt-T', 'ResNet-18']
    assert all(int(iterations) >= 2 for _, iterations, *_ in rows)
    for config in ('atss_cpolynext_t_treecrowns', 'atss_resnet18_treecrowns'):
        assert len(list((tmp_path / config / 'pictures').glob('*.jpg'))) == 11
