"""The per-cell clip of the authors' A recipe: the identity, with a modified gradient::

n = |g| / scale
g * max_norm / (n + 1e-6)  where n > max_norm,  otherwise g
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import wide_dtype


def clip_gradient(x: Tensor, max_norm: float, scale: float | Tensor = 1.0) -> Tensor:
    """Return ``x``; in backward, scale the incoming gradient to at most a given norm.

    Args:
        x: Any tensor.
        max_norm: Largest L2 norm over the whole tensor, batch included.
        scale: The factor on the loss (loss scaling, gradient accumulation), a number or a scalar
            on the device of ``x``: ``max_norm`` applies to the unscaled gradient.
    """
    return _ClipGradient.apply(x, max_norm, scale)


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, max_norm, scale):
        ctx.max_norm, ctx.scale = max_norm, scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        norm = torch.linalg.vector_norm(grad, dtype=wide_dtype(grad)) / ctx.scale
        factor = torch.where(norm > ctx.max_norm, ctx.max_norm / (norm + 1e-6), 1.0)
        return grad * factor.to(grad.dtype), None, None
