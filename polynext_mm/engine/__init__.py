"""Optimizers, hooks and launching."""

from .data_checks import DataCheckHook
from .hooks import CheckpointGuardHook, MachineHook
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor

__all__ = [
    'AutocastOptimWrapper',
    'CheckpointGuardHook',
    'DataCheckHook',
    'MachineHook',
    'PolyNeXtOptimWrapperConstructor',
]
