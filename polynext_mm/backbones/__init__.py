"""Backbones for mm's registries."""

from .metaformer import MetaFormer
from .multiscale import MultiScale
from .polynext import PolyNeXt

__all__ = ['MetaFormer', 'MultiScale', 'PolyNeXt']
