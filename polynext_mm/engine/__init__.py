"""Optimizers, hooks and launching."""

from ..compat import require_mmengine

require_mmengine()

from .hooks import CheckpointGuardHook, MachineHook  # noqa: E402 - an error above says more
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor  # noqa: E402

__all__ = [
    'AutocastOptimWrapper',
    'CheckpointGuardHook',
    'MachineHook',
    'PolyNeXtOptimWrapperConstructor',
]
