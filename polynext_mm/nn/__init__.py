"""PolyNeXt in torch alone: nothing below this door knows of configs, files or mm."""

from .attention import polynomial_attention
from .polynext import ARCHS, Arch, PolyNeXt, PolyNeXtClassifier, get_arch

__all__ = ['ARCHS', 'Arch', 'PolyNeXt', 'PolyNeXtClassifier', 'get_arch', 'polynomial_attention']
