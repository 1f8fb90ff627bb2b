"""The tests and the report of ``make test-cuda``, tried without a GPU."""

import json

import pytest
import torch

from tests.cuda import gpu_report
from tests.helpers.files import ROOT
from tests.helpers.programs import python

REPORT = ROOT / 'tests' / 'cuda' / 'gpu_report.py'
PATHS = dict(PYTHONPATH=str(ROOT), cwd=ROOT)


@pytest.mark.heavy
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_why_it_does_nothing(tmp_path):
    printed = python(REPORT, '--out', tmp_path, POLYNEXT_TEST_DEVICE='cuda', **PATHS)
    assert printed.startswith('skipped: torch') and 'finds no cuda device' in printed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_its_tests_are_skipped():
    printed = python(
        *('-m', 'pytest', '-m', 'cuda', '-rs', ROOT / 'tests' / 'cuda' / 'test_ops.py'),
        POLYNEXT_TEST_DEVICE='cuda',
        **PATHS,
    )
    assert 'torch finds no cuda device' in printed and 'passed' not in printed


@pytest.mark.heavy
def test_it_ends_in_time(tmp_path):
    """And says of every stage that it was not run."""
    printed = python(REPORT, '--out', tmp_path, '--budget', 1, POLYNEXT_TEST_DEVICE='cpu', **PATHS)
    report = (tmp_path / 'report.md').read_text()
    assert report in printed and 'device cpu' in report
    assert report.count('\n## ') == 6
    assert report.count(': not run, the budget is spent') == report.count('\n\n`') == 9


@pytest.mark.slow
def test_what_a_stopped_run_had_finished_is_reported_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, 'LEAST', 0)
    monkeypatch.delenv('PYTEST_XDIST_WORKER', raising=False)  # the run inside is no worker of this
    results = tmp_path / 'tests.jsonl'
    done = 'tests/cuda/test_ops.py::test_memory_of_attention_is_linear_in_tokens'
    results.write_text(f'{json.dumps(dict(test=done, outcome="passed", message=""))}\n')
    monkeypatch.setenv('POLYNEXT_TEST_DEVICE', 'cpu')
    chosen = 'test_memory_of_attention or test_float16_scores'
    outcome = gpu_report.run_tests(('test_ops.py', '-k', chosen), ('-n', '0'), results, 300)
    assert outcome == ('- 1 passed, 0 failed, 0 skipped', False)
    outcome = gpu_report.run_tests(('test_ops.py',), ('-n', '0'), results, 0.5)
    assert outcome.text.endswith('- stopped after 0 s, with tests left') and not outcome.failed


@pytest.mark.slow
def test_on_the_cpu(tmp_path):
    """Finds mistakes in the tests, not in what they test."""
    demo = 'tests/cuda/test_training.py::test_the_demo'
    printed = python(
        *(REPORT, '--out', tmp_path, '--', '-n', 0, '--deselect', demo),
        timeout=1800,
        POLYNEXT_TEST_DEVICE='cpu',
        **PATHS,
    )
    report = (tmp_path / 'report.md').read_text()
    assert report in printed
    assert report.count('\n## ') == 6
    assert ' passed, 0 failed, ' in report and 'cpolynext_t' in report and 'device cpu' in report
