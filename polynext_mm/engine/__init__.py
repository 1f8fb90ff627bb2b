"""Optimizers, hooks and launching."""

from .hooks import CheckpointGuardHook, MachineHook
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor

__all__ = [
    'AutocastOptimWrapper',
    'CheckpointGuardHook',
    'MachineHook',
    'PolyNeXtOptimWrapperConstructor',
]
