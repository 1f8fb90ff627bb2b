"""Checkpoints of trainings: read with mmengine's loader, saved, resumed, and their folder."""

from ...compat import require_mmengine

require_mmengine()

# ruff: noqa: E402 - the error above says more than theirs
from .loader import install_loader

__all__ = ['install_loader']
