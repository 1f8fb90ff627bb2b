"""Test processes share the cores, so each computes on one thread.

OpenMP threads that wait for each other on a busy machine are many times slower.
"""

import gc
import logging
import multiprocessing
import os
import sys

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')

_STARTS = ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.system')
_light_test = None


def _refuse_processes(event: str, args: tuple) -> None:
    if _light_test is not None and event in _STARTS:
        raise RuntimeError(f'{_light_test} starts a process: mark it with pytest.mark.heavy')


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Keep `make quick` quick: a test that starts processes must be marked."""
    global _light_test
    marks = ('heavy', 'slow', 'cuda')
    _light_test = None if any(map(item.get_closest_marker, marks)) else item.nodeid
    try:
        return (yield)
    finally:
        _light_test = None


def pytest_collection_finish():
    """Spare the tests what mm does often and slowly, among all that is imported by now.

    Its data sets collect garbage, and it formats a config five times, longer than a tiny run takes.
    """
    gc.collect()
    gc.freeze()
    if 'mmengine' in sys.modules:
        import mmengine.config.config
        from yapf.yapflib import yapf_api

        for module in (yapf_api, mmengine.config.config):  # upstream's has a name of its own for it
            if hasattr(module, 'FormatCode'):
                module.FormatCode = lambda text, **style: (text, False)


@pytest.fixture(autouse=True)
def any_cpu_is_fast_in_bfloat16(monkeypatch):
    """Test mixed precision on CPUs without instructions for it too."""
    from polynext_mm.compat import torch_features

    monkeypatch.setattr(torch_features, 'has_fast_bfloat16', lambda: True)


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


@pytest.fixture(autouse=True)
def globals_of_mmengine_end_with_their_test():
    """Forget scopes, loggers, message hubs and visualizers, which mmengine keeps by name.

    The name of a run has the second of its start, and that of a temporary folder is used again: a
    later run may get the scope of mmdet, or a logger and a visualizer whose folder is gone.
    """
    yield
    if 'mmengine.visualization' in sys.modules:
        from mmengine.logging import MessageHub, MMLogger
        from mmengine.registry import DefaultScope
        from mmengine.visualization import Visualizer

        for logger in MMLogger._instance_dict.values():
            for handler in logger.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.close()
        for kind in (DefaultScope, MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
            kind._instance_dict.clear()


def pytest_collection_modifyitems(items):
    """Skip what computes in float16 on CPUs where torch does not."""
    import torch

    from polynext_mm.compat.torch_features import FLOAT16_ON_CPUS
    from tests.marks import needs

    for item in items:
        values = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        if any(value is torch.float16 for value in values):
            item.add_marker(needs(FLOAT16_ON_CPUS))
