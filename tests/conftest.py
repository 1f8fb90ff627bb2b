"""Test processes share the cores, so each computes on one thread.

OpenMP threads that wait for each other on a busy machine are many times slower.
"""

import os

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture
def quick_configs(monkeypatch):
    """Log configs unformatted: mmengine formats them five times, longer than a tiny run takes."""
    from mmengine.config import Config

    monkeypatch.setattr(Config, 'pretty_text', property(lambda config: repr(config._cfg_dict)))
