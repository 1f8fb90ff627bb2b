"""The tests and the report of ``make test-cuda``, tried without a GPU."""

import pytest
import torch

from tests.helpers.files import ROOT
from tests.helpers.programs import python

REPORT = ROOT / 'tests' / 'cuda' / 'gpu_report.py'
PATHS = dict(PYTHONPATH=str(ROOT), cwd=ROOT)


@pytest.mark.heavy
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_why_it_does_nothing(tmp_path):
    printed = python(REPORT, '--out', tmp_path, POLYNEXT_TEST_DEVICE='cuda', **PATHS)
    assert printed.startswith('skipped: torch') and 'finds no cuda device' in printed
    printed = python(
        *('-m', 'pytest', '-m', 'cuda', '-rs', ROOT / 'tests' / 'cuda' / 'test_ops.py'),
        POLYNEXT_TEST_DEVICE='cuda',
        **PATHS,
    )
    assert 'torch finds no cuda device' in printed and 'passed' not in printed


@pytest.mark.slow
def test_on_the_cpu(tmp_path):
    """Finds mistakes in the tests, not in what they test."""
    printed = python(
        *(REPORT, '--out', tmp_path, '--', '-k', 'not demo'),
        timeout=1800,
        POLYNEXT_TEST_DEVICE='cpu',
        **PATHS,
    )
    report = (tmp_path / 'report.md').read_text()
    assert report in printed
    assert ', 0 failed, ' in report and 'cpolynext_t' in report and 'device cpu' in report
