"""Optimizers, hooks and launching."""

from ..compat import require_mmengine

require_mmengine()

from .data_checks import DataCheckHook  # noqa: E402 - an error above says more
from .hooks import CheckpointGuardHook, MachineHook  # noqa: E402
from .optim import AutocastOptimWrapper, PolyNeXtOptimWrapperConstructor  # noqa: E402

__all__ = [
    'AutocastOptimWrapper',
    'CheckpointGuardHook',
    'DataCheckHook',
    'MachineHook',
    'PolyNeXtOptimWrapperConstructor',
]
