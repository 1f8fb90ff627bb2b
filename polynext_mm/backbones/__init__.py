"""Backbones for mm's registries."""

from ..compat import require_mmengine

require_mmengine()

from .metaformer import MetaFormer  # noqa: E402 - an error above says more
from .multiscale import MultiScale  # noqa: E402
from .polynext import PolyNeXt  # noqa: E402

__all__ = ['MetaFormer', 'MultiScale', 'PolyNeXt']
