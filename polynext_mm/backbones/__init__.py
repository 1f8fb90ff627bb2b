"""Backbones for mm's registries."""

from ..compat import require_mmengine

require_mmengine()

from .polynext import PolyNeXt  # noqa: E402 - an error above says more

__all__ = ['PolyNeXt']
