"""Optimizers, hooks and launching."""

from .checkpointing import AtomicCheckpointHook, NonFiniteError
from .hooks import CheckpointGuardHook, MachineHook
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor
from .reproducibility import ReproducibilityHook
from .work_dir import WorkDirHook

__all__ = [
    'AtomicCheckpointHook',
    'AutocastOptimWrapper',
    'CheckpointGuardHook',
    'MachineHook',
    'NonFiniteError',
    'PolyNeXtOptimWrapperConstructor',
    'ReproducibilityHook',
    'WorkDirHook',
]
