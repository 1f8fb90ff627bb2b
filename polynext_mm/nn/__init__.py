"""PolyNeXt in plain torch: nothing in this package knows about configs, files or mm.

:mod:`polynext_mm.nn.plain` is the network as the paper writes it; read that first.
"""

from .arch import ARCHS, Arch, get_arch
from .classifier import PolyNeXtClassifier
from .ops import plain_ops, poly_attention, triton_ops
from .polynext import PolyNeXt

__all__ = [
    'ARCHS',
    'Arch',
    'PolyNeXt',
    'PolyNeXtClassifier',
    'get_arch',
    'plain_ops',
    'poly_attention',
    'triton_ops',
]
