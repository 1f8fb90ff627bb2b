"""Decide whether a kernel may replace the calls of layers.

Adapters, pruning, parametrizations, quantized layers and hooks all rely on a layer being called. So
a kernel runs only if every layer is exactly what this package made it; otherwise the layers are
called. This check runs in every forward of every branch, where microseconds count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks

from .ops import dispatch

# FakeTensor stands for a Tensor when kernels are counted or compiled without memory.
PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, FakeTensor))
# Attributes of a module that change its call, or that a kernel would bypass.
HOOKS = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
PATCHES = frozenset(('forward', '_compiled_call_impl'))


def kernel_weights(
    module: nn.Module, kinds: Mapping[str, type[nn.Module]]
) -> list[Tensor | None] | None:
    """Return the weights of layers for a kernel, or None where the layers must be called.

    Args:
        module: The module whose children are the layers.
        kinds: The class that each layer must have, by name, in the order of the weights.
    """
    if not dispatch.kernels_allowed() or hooked_globally():
        return None
    layers = module._modules
    weights: list[Tensor | None] = []
    for name, kind in kinds.items():
        layer = layers[name]
        if type(layer) is not kind or not is_stock(layer):
            return None
        weights.append(layer._parameters['weight'])
    return weights


def is_stock(layer: nn.Module) -> bool:
    """Return whether a layer has its own ``forward``, a dense weight, no hooks and no bias."""
    own = layer.__dict__
    for name in HOOKS:
        if own[name]:
            return False
    if not PATCHES.isdisjoint(own):
        return False
    parameters = own['_parameters']
    if 'weight' not in parameters or parameters.get('bias') is not None:
        return False
    weight = parameters['weight']
    return weight is None or (
        type(weight) in PLAIN_TENSORS
        and weight.layout is torch.strided
        and weight.is_floating_point()
    )


def hooked_globally() -> bool:
    """Return whether any hooks are registered for all modules."""
    return bool(
        hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_backward_pre_hooks
        or hooks._global_backward_hooks
    )


def calls_its_own_forward(module: nn.Module) -> bool:
    """Return whether a module is not patched or compiled, and no hook comes before its forward."""
    own = module.__dict__
    return not own['_forward_pre_hooks'] and PATCHES.isdisjoint(own)


def is_observed(module: nn.Module) -> bool:
    """Return whether hooks see the inputs and outputs of a module, or a compiler calls it."""
    own = module.__dict__
    return bool(own['_forward_pre_hooks'] or own['_forward_hooks']) or not PATCHES.isdisjoint(own)
