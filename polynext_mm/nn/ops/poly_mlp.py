"""PolyMLP, on the residual stream (paper, PolyMLP)::

    u, v = the halves of x W_in^T
    x + keep * LN(u * v) W_out^T

For backward the kernel keeps x, u and v, in the dtype of the products, and recomputes the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .blocks import add_product, added, added_outer, blocks, narrowed, positions
from .norms import norm_of_product, norm_of_product_backward
from .stream import NarrowStream, run_branch


def add_poly_mlp(
    x: Tensor,
    keep: Tensor | None,
    w_in: Tensor,
    w_norm: Tensor | None,
    w_out: Tensor,
    out: Tensor | None = None,
    stream: NarrowStream | None = None,
) -> Tensor:
    """Compute ``x + keep * LN(u * v) w_out^T`` with u and v the halves of ``x w_in^T``.

    Args:
        x: The residual stream, (B, H, W, C). Weights are in the dtype of products on it, except the
            norm's, which is wide; they may be copies (:mod:`~polynext_mm.nn.ops.ready`).
        keep: The drop path factor, (B, 1, 1, 1), or None for 1.
        w_in: (2E, C).
        w_norm: (E,), or None for 1.
        w_out: (C, E).
        out: Where the result may be written if no gradient is needed: contiguous, like ``x`` or
            ``x`` itself.
        stream: Where narrow copies of the residual stream come from and go to, or None.

    Returns:
        The map (B, H, W, C) in the dtype of ``x``, new unless it is ``out``.
    """
    weights = w_in, w_norm, w_out
    return run_branch(_Kernel, x, keep, weights=weights, out=out, stream=stream)


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, narrow_x, narrow_y, keep, w_in, w_norm, w_out, out=None):
        y = torch.empty_like(x) if out is None else out
        maps = map(positions, (x, narrow_x, narrow_y, y))
        for keep_b, x_b, narrow_b, narrow_y_b, y_b in blocks(w_in.shape[0], keep, *maps):
            narrow_b = x_b.to(w_in.dtype) if narrow_b is None else narrow_b
            normed = norm_of_product(F.linear(narrow_b, w_in), w_norm)
            add_product(x_b, normed, w_out.t(), keep_b, out=y_b, narrow=narrow_y_b)
        return y

    @staticmethod
    def forward(ctx, x, narrow_x, narrow_y, keep, w_in, w_norm, w_out):
        dispatch.remember(ctx)
        y = torch.empty_like(x)
        narrow_x = x.to(w_in.dtype) if narrow_x is None else narrow_x
        halves = narrow_x.new_empty(*x.shape[:3], w_in.shape[0])
        ctx.save_for_backward(narrow_x, keep, w_in, w_norm, w_out, halves)
        maps = map(positions, (x, narrow_x, narrow_y, y, halves))
        for keep_b, x_b, narrow_b, narrow_y_b, y_b, halves_b in blocks(w_in.shape[0], keep, *maps):
            normed = norm_of_product(torch.mm(narrow_b, w_in.t(), out=halves_b), w_norm)
            add_product(x_b, normed, w_out.t(), keep_b, out=y_b, narrow=narrow_y_b)
        return y

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad):
        x, keep, w_in, w_norm, w_out, halves = ctx.saved_tensors
        grad_w_in = grad_w_norm = grad_w_out = None
        grad = grad.contiguous()
        grad_x = torch.empty_like(grad)
        maps = map(positions, (grad, grad_x, x, halves))
        for keep_b, g, grad_x_b, x_b, halves_b in blocks(w_in.shape[0], keep, *maps):
            g_out = narrowed(g, keep_b, x.dtype)
            normed, g_halves, part = norm_of_product_backward(g_out @ w_out, halves_b, w_norm)
            grad_w_norm = added(grad_w_norm, part)
            grad_w_out = added_outer(grad_w_out, g_out, normed)
            grad_w_in = added_outer(grad_w_in, g_halves, x_b)
            add_product(g, g_halves, w_in, None, out=grad_x_b)
        return grad_x, None, None, None, grad_w_in, grad_w_norm, grad_w_out
