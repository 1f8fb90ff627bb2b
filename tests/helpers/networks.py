"""Small networks, and what is asked of all."""

from __future__ import annotations

import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.registry import MODELS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import polynext_mm  # noqa: F401 - registers
from polynext_mm.compat.torch_features import CUSTOM_OPERATORS

ARCH = 'cpolynext_t'

SIZE = (64, 64)

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


class Operators(TorchDispatchMode):
    """Lists the operators of this package that are called inside, in ``names``."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'polynext_mm':
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def build(**settings) -> nn.Module:
    """Build a PolyNeXt from the registry, by default with TINY_ARCH."""
    return MODELS.build(dict(dict(type='PolyNeXt', arch=TINY_ARCH), **settings))


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


def assert_counted_right(model: nn.Module, *inputs) -> None:
    """mmengine's count agrees with torch's, which counts products and convolutions alone."""
    found = get_model_complexity_info(model, inputs=inputs, show_table=False, show_arch=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    by_operator = FlopAnalyzer(model, inputs).by_operator()
    assert found['flops'] == sum(by_operator.values())
    products = sum(by_operator.pop(name) for name in ('conv', 'linear', 'matmul'))
    if CUSTOM_OPERATORS.is_there:  # else torch counts a column for the row sums of attention
        assert products == counter.get_total_flops() / 2
    # the rest is counted by element
    assert all(name.endswith(('_norm', '2d')) for name in by_operator), by_operator
    assert found['params'] == sum(param.numel() for param in model.parameters())
