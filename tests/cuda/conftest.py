"""These tests compare a GPU with the CPU: ``make test-cuda``.

POLYNEXT_TEST_DEVICE=cpu runs them on the CPU, fewer and smaller, to find mistakes in the tests.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.cuda.on_device import DEVICE, RESULTS, is_available


@pytest.hookimpl(tryfirst=True)  # before markers are selected
def pytest_collection_modifyitems(config, items):
    here = os.path.dirname(__file__)
    if os.environ.get(RESULTS):
        lines = Path(os.environ[RESULTS]).read_text().splitlines()
        done = {json.loads(line)['test'] for line in lines}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.cuda)
            if not is_available():
                item.add_marker(pytest.mark.skip(reason=f'torch finds no {DEVICE} device'))


def pytest_runtest_logreport(report):
    """Write down what is known, at once: the run may be stopped."""
    if not os.environ.get(RESULTS) or 'PYTEST_XDIST_WORKER' in os.environ:
        return
    if report.outcome == 'passed' and report.when != 'call':
        return
    about, message = report.longrepr, ''
    if isinstance(about, tuple):  # of a skipped test: file, line, reason
        message = about[2].removeprefix('Skipped: ')
    elif about is not None:
        message = str(getattr(getattr(about, 'reprcrash', None), 'message', about))
    first = next(iter(message.strip().splitlines()), '')
    result = dict(test=report.nodeid, outcome=report.outcome, message=first)
    with open(os.environ[RESULTS], 'a') as file:
        file.write(f'{json.dumps(result)}\n')


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def cuda(device):
    """For what the CPU does not have."""
    if device != 'cuda':
        pytest.skip(f'{device} has none of this')


@pytest.fixture(autouse=True)
def exact_float32():
    """Products and convolutions of float32 in float32, not in tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
