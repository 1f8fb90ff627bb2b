"""Two test processes share the cores: each computes on one thread, for OpenMP threads that wait for each
other on a busy machine are many times slower."""

import os

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture
def quick_configs(monkeypatch):
    """mmengine lays out a run's config prettily five times, which takes longer than a tiny run."""
    from mmengine.config import Config

    monkeypatch.setattr(Config, 'pretty_text', property(lambda config: repr(config._cfg_dict)))
