"""Initialization for training from scratch."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .batch_norm import PositionNorm
from .cell import Cell, Downsample
from .layers import DepthwiseConv, LayerNorm, PolyAttn, PolyConv, PolyMLP

_PAPER = partial(nn.init.kaiming_normal_, nonlinearity='relu')
_TORCH = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))  # PyTorch's default
_NARROW = partial(nn.init.trunc_normal_, std=0.02)

#: Initializers of matrices and kernels: in PolyConv, PolyMLP and downsampling, and elsewhere.
WEIGHT_INITS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    'imagenet': (_PAPER, _TORCH),
    'trunc_normal': (_NARROW, _NARROW),
}


def initialize(network: nn.Module, weight_init: str) -> None:
    """Initialize every layer of a network in place.

    Args:
        network: A network of this package's layers.
        weight_init: A key of :data:`WEIGHT_INITS`.
    """
    inside, elsewhere = WEIGHT_INITS[weight_init]
    inner = {
        layer
        for module in network.modules()
        if isinstance(module, (PolyConv, PolyMLP, Downsample))
        for layer in module.children()
    }
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, DepthwiseConv)):
            (inside if module in inner else elsewhere)(module.weight)
        elif isinstance(module, (LayerNorm, PositionNorm, Cell, PolyAttn)):
            module.reset_parameters()
