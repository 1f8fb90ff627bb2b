"""Tiny networks, which need torch alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# The smallest network with everything: both mixers, both kinds of downsampling, an unused gate.
TINY_ARCH = dict(
    widths=(8, 16, 16, 24),
    depths=(1, 2, 1, 1),
    stacks=(1, 2, 1, 1),
    mixers=('conv', 'conv', 'attn', 'attn'),
    conv_ratios=(1, 1, 0.75, 0.75),
    mlp_ratios=(2, 2, 1.75, 1.75),
    coarse_sizes=(3, 5, 5, 5),
    downsampling=('sep3x3', 'full3x3'),
    gate_init=(0, -0.5, -1, -1.5, -2),
)

# Its second and third stage, of convolutions and of attention.
TWO_STAGES = {
    name: value[1:3] if len(value) == 4 else value for name, value in TINY_ARCH.items()
} | dict(depths=(1, 1), stacks=(1, 1))


class Operators(TorchDispatchMode):
    """Lists the operators of this package that are called inside, in ``names``."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'polynext_mm':
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights with which all of its parts matter, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1:
                param.copy_(noise / param[0].numel() ** 0.5)
            else:  # near its initial value
                param.add_(noise / 4)
    return model
