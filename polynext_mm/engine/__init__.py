"""Optimizers, hooks and launching."""

from .checkpointing import AtomicCheckpointHook, NonFiniteError
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
    'CheckpointGuardHook',
    'InterruptHook',
    'MachineHook',
    'NonFiniteError',
    'NonFiniteHook',
    'PolyNeXtOptimWrapperConstructor',
    'ReproducibilityHook',
    'WatchdogHook',
    'WorkDirHook',
]
