"""Test processes share the cores, so each computes on one thread.

OpenMP threads that wait for each other on a busy machine are many times slower.
"""

import gc
import multiprocessing
import os

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture
def quick_configs(monkeypatch):
    """Log configs unformatted: mmengine formats them five times, longer than a tiny run takes."""
    from mmengine.config import Config

    monkeypatch.setattr(Config, 'pretty_text', property(lambda config: repr(config._cfg_dict)))


@pytest.fixture(autouse=True)
def workers_end_with_their_test():
    """Shut workers down while their queues work.

    A runner is collected in a cycle, its queues first, and torch then waits five seconds for each
    worker that it can no longer tell to end.
    """
    yield
    if multiprocessing.active_children():
        from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

        for iterator in gc.get_objects():
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()


def pytest_collection_modifyitems(items):
    """Skip what computes in float16 on CPUs where torch does not."""
    import torch

    from marks import needs
    from polynext_mm.compat.torch_features import FLOAT16_ON_CPUS

    for item in items:
        values = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        if any(value is torch.float16 for value in values):
            item.add_marker(needs(FLOAT16_ON_CPUS))
