"""These tests compare a GPU with the CPU: ``make test-cuda``.

POLYNEXT_TEST_DEVICE=cpu runs them on the CPU, fewer and smaller, to find mistakes in the tests.
"""

import os

import pytest
import torch

from tests.cuda.on_device import DEVICE, is_available


@pytest.hookimpl(tryfirst=True)  # before markers are selected
def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.cuda)
            if not is_available():
                item.add_marker(pytest.mark.skip(reason=f'torch finds no {DEVICE} device'))


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
