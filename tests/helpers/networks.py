"""Backbones from mm's registry, and what is asked of all."""

from __future__ import annotations

import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polynext_mm  # noqa: F401 - registers
from polynext_mm.compat.torch_features import CUSTOM_OPERATORS
from tests.helpers.tiny import TINY_ARCH

ARCH = 'cpolynext_t'

SIZE = (64, 64)


def build(**settings) -> nn.Module:
    """Build a PolyNeXt from the registry, by default with TINY_ARCH."""
    return MODELS.build(dict(dict(type='PolyNeXt', arch=TINY_ARCH), **settings))


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
