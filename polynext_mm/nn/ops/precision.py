"""Dtype rules: what may be computed in half precision, and what never is.

Convolutions and matrix products follow autocast, which leaves the residual stream in float32. A
norm returns the dtype of its input. Its statistics, powers and sums are float32, or float64 where
the input is.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat.torch_features import autocast_dtype
from . import dispatch

LN_EPS = 1e-5


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of convolutions and matrix products on ``x``: autocast's, where it is on."""
    device = x.device.type
    if device == 'meta':  # it stands for an accelerator
        device = 'cuda'
    if x.dtype is torch.float64:
        return x.dtype
    return autocast_dtype(device) or x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of norms, powers and sums of ``x``: never half."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is."""
    return x.to(wide_dtype(x))


def narrow(x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return weights in the dtype of matrix products on ``x``; None stays None.

    On a GPU that is one launch for all of them, and one for their gradients. The weights of norms,
    which are vectors, stay as they are: a norm takes wide ones, or casts them where it has to.
    """
    dtype = matmul_dtype(x)
    casts = [w is not None and w.dtype is not dtype and w.ndim > 1 for w in weights]
    if not any(casts):
        return weights
    cast = iter(dispatch.run(_cast, _Cast, dtype, *itertools.compress(weights, casts)))
    return tuple(next(cast) if is_cast else w for w, is_cast in zip(weights, casts))


def _cast(dtype, *weights):
    return tuple(weight.to(dtype) for weight in weights)


def _cast_at_once(dtypes, tensors):
    # contiguous: a gradient strided unlike its weight would be copied once more
    cast = [
        torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        for tensor, dtype in zip(tensors, dtypes)
    ]
    torch._foreach_copy_(cast, tensors)
    return cast


class _Cast(dispatch.Kernel):
    @staticmethod
    def infer(dtype, *weights):
        return tuple(_cast_at_once([dtype] * len(weights), weights))

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.dtypes = [weight.dtype for weight in weights]
        return _Cast.infer(dtype, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, *_cast_at_once(ctx.dtypes, grads)


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the LN of ``x`` over its last dimension, without bias, in its dtype."""
    weight = None if weight is None else wide(weight)
    return F.layer_norm(wide(x), x.shape[-1:], weight, None, LN_EPS).to(x.dtype)
