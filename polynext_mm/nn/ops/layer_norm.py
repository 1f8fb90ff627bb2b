"""Layer norm of a map, with a weight and no bias: ``LN(x)``.

On GPUs the kernel is in Triton. Elsewhere torch's own, the plain form, is just as good.
"""

from __future__ import annotations

from torch import Tensor

from ...compat.torch_features import is_compiling
from . import dispatch
from .norms import add_norm_backward, norm, norms_triton
from .precision import layer_norm as plain


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Compute the LN of ``x`` over its last dimension, with float32 statistics.

    Args:
        x: (..., C).
        weight: (C,), or None for 1.

    Returns:
        A new map in the shape and dtype of ``x``.
    """
    if is_compiling() or not dispatch.by_triton(norms_triton, x.shape[-1], [x], [weight]):
        return plain(x, weight)
    return dispatch.run(plain, _Kernel, x, weight)


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, weight):
        return norm(x, weight)[0]

    @staticmethod
    def forward(ctx, x, weight):
        dispatch.remember(ctx)
        out, mean, rstd = norm(x, weight)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad):
        x, weight, *moments = ctx.saved_tensors
        return add_norm_backward(grad.contiguous(), None, x, *moments, weight)
