"""What the tests of weights share."""

from __future__ import annotations

import pytest

from tests.helpers.configs import config_to_load_into
from tests.helpers.samples import ade20k_scenes


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pt'


@pytest.fixture
def config(tmp_path):
    """One iteration at a rate that changes nothing, and nothing after it."""
    return config_to_load_into(ade20k_scenes(), tmp_path / 'work')
