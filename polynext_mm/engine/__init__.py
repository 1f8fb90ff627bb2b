"""Optimizers, hooks and launching."""

from ..compat import require_mmengine

require_mmengine()

# ruff: noqa: E402 - the error above says more than theirs
from .checkpointing import AtomicCheckpointHook, NonFiniteError
from .cuda_graphs import CUDAGraphHook
from .data_checks import DataCheckHook
from .hooks import CheckpointGuardHook, MachineHook
from .interruption import InterruptHook
from .nonfinite import NonFiniteHook
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor
from .reproducibility import ReproducibilityHook
from .watchdog import WatchdogHook
from .work_dir import WorkDirHook

__all__ = [
    'AtomicCheckpointHook',
    'AutocastOptimWrapper',
    'CUDAGraphHook',
    'CheckpointGuardHook',
    'DataCheckHook',
    'InterruptHook',
    'MachineHook',
    'NonFiniteError',
    'NonFiniteHook',
    'PolyNeXtOptimWrapperConstructor',
    'ReproducibilityHook',
    'WatchdogHook',
    'WorkDirHook',
]
