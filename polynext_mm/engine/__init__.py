"""Optimizers, hooks and launching."""

from ..compat import require_mmengine

require_mmengine()

# ruff: noqa: E402 - the error above says more than theirs
from .checkpoints.guard import CheckpointGuardHook
from .checkpoints.saving import AtomicCheckpointHook, NonFiniteError
from .checkpoints.work_dir import WorkDirHook
from .checks.data import DataCheckHook
from .checks.training import TrainingCheckHook
from .cuda_graphs import CUDAGraphHook
from .interruption import InterruptHook, LostWorkerError
from .kernels import KernelCheckHook
from .nonfinite import NonFiniteHook
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor
from .report import ReportHook
from .reproducibility import ReproducibilityHook
from .watchdog import WatchdogHook

__all__ = [
    'AtomicCheckpointHook',
    'AutocastOptimWrapper',
    'CUDAGraphHook',
    'CheckpointGuardHook',
    'DataCheckHook',
    'InterruptHook',
    'KernelCheckHook',
    'LostWorkerError',
    'NonFiniteError',
    'NonFiniteHook',
    'PolyNeXtOptimWrapperConstructor',
    'ReportHook',
    'ReproducibilityHook',
    'TrainingCheckHook',
    'WatchdogHook',
    'WorkDirHook',
]
