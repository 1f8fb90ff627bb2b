"""Backbones for mm's registries."""

from .polynext import PolyNeXt

__all__ = ['PolyNeXt']
