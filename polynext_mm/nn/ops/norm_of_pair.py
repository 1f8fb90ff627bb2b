"""The start of a cell (paper, cell)::

    x = LN(a0 * s0 + a1 * s1)

The kernel keeps the pair, their sum and the moments of the norm for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .blocks import added, blocks, joined, positions
from .norms import norm_of_sum, norm_of_sum_backward


def norm_of_pair(
    s0: Tensor,
    s1: Tensor,
    a0: Tensor,
    a1: Tensor,
    w_norm: Tensor,
    narrow: Tensor | None = None,
) -> Tensor:
    """Compute ``LN(a0 * s0 + a1 * s1)``.

    Args:
        s0: The older map of the pair, (B, H, W, C).
        s1: The newer one.
        a0: The scale of s0, (C,).
        a1: The scale of s1, (C,).
        w_norm: The weight of the norm, (C,).
        narrow: A map (B, H, W, C) to write a copy of the result to, or None.

    Returns:
        A new map (B, H, W, C), in the dtype of the products with the scales.
    """
    return dispatch.run_kernel(_Kernel, s0, s1, narrow, weights=(a0, a1, w_norm))


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(s0, s1, narrow, a0, a1, w_norm):
        parts = []
        maps = map(positions, (s0, s1, narrow))
        for _, s0_b, s1_b, narrow_b in blocks(s0.shape[-1], None, *maps):
            parts.append(norm_of_sum(s0_b, s1_b, a0, a1, w_norm, narrow_b)[0])
        return _shaped(joined(parts), s0)

    @staticmethod
    def forward(ctx, s0, s1, narrow, a0, a1, w_norm):
        dispatch.remember(ctx)
        maps = map(positions, (s0, s1))
        x, total, mean, rstd = norm_of_sum(*maps, a0, a1, w_norm, positions(narrow))
        ctx.save_for_backward(s0, s1, a0, a1, w_norm, total, mean, rstd)
        return _shaped(x, s0)

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad):
        s0, s1, a0, a1, w_norm, total, mean, rstd = ctx.saved_tensors
        grad_s0, grad_s1 = torch.empty_like(s0), torch.empty_like(s1)
        grad_a0 = grad_a1 = grad_w_norm = None
        maps = map(positions, (grad.contiguous(), s0, s1, grad_s0, grad_s1))
        for _, g, s0_b, s1_b, grad_s0_b, grad_s1_b, total_b, *moments in blocks(
            s0.shape[-1], None, *maps, total, mean, rstd
        ):
            parts = norm_of_sum_backward(
                g, total_b, moments, (s0_b, s1_b), (a0, a1), w_norm, out=(grad_s0_b, grad_s1_b)
            )
            grad_a0, grad_a1, grad_w_norm = map(added, (grad_a0, grad_a1, grad_w_norm), parts)
        return grad_s0, grad_s1, None, grad_a0, grad_a1, grad_w_norm


def _shaped(rows, like):
    # Not a view: a compiled stack would be compiled again for an input that is a view.
    return torch.ops.aten._unsafe_view(rows, like.shape)
