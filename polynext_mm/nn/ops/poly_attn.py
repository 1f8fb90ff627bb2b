"""PolyAttn, on the residual stream (paper, PolyAttn)::

    m, n = the halves of LN(x) W_in^T
    q, k, v = q_conv(m), k_conv(m), v_conv(n)
    x + keep * smooth(poly_attention(q, k, v)) W_out^T

``q_conv``, ``k_conv``, ``v_conv`` and ``smooth`` are depthwise convolutions.

The kernel keeps what autograd would, but needs fewer calls and passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .blocks import add_product, added_outer, blocks, narrowed, positions
from .depthwise import conv, conv_backward
from .norms import add_norm_backward, norm
from .poly_attention import attention, attention_backward
from .stream import NarrowStream, run_branch


def add_poly_attn(
    x: Tensor,
    keep: Tensor | None,
    heads: int,
    w_norm: Tensor | None,
    w_in: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_smooth: Tensor,
    w_out: Tensor,
    out: Tensor | None = None,
    stream: NarrowStream | None = None,
) -> Tensor:
    """Compute ``x + keep * smooth(poly_attention(q, k, v)) w_out^T``.

    Args:
        x: The residual stream, (B, H, W, C). Weights are in the dtype of products on it, except the
            norm's, which is wide; they may be copies (:mod:`~polynext_mm.nn.ops.ready`).
        keep: The drop path factor, (B, 1, 1, 1), or None for 1.
        heads: Of attention.
        w_norm: (C,), or None for 1.
        w_in: (2E, C), E a multiple of ``heads``.
        w_q: (E, 1, S, S) with S odd, times the scale of the scores.
        w_k: (E, 1, S, S) with S odd.
        w_v: (E, 1, S, S) with S odd.
        w_smooth: (E, 1, S, S) with S odd.
        w_out: (C, E).
        out: Where the result may be written if no gradient is needed: contiguous, like ``x`` or
            ``x`` itself.
        stream: Where narrow copies of the residual stream come from and go to, or None.

    Returns:
        The map (B, H, W, C) in the dtype of ``x``, new unless it is ``out``.
    """
    weights = w_norm, w_in, w_q, w_k, w_v, w_smooth, w_out
    return run_branch(_Kernel, x, keep, heads, weights=weights, out=out, stream=stream)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View (B, H, W, E) as (B, heads, H * W, E / heads)."""
    return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """Return (B, H, W, E) of (B, heads, H * W, E / heads), with H and W of the map ``like``."""
    return x.transpose(1, 2).flatten(2).unflatten(1, like.shape[1:3])


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, narrow_x, narrow_y, keep, heads, w_norm, *weights, out=None):
        t = norm(positions(x), w_norm, weights[0].dtype)[0]
        smooth = _smooth(x, t, heads, *weights[:-1])[-1]
        y = torch.empty_like(x) if out is None else out
        return _add(x, keep, smooth, weights[-1], y, narrow_y)

    @staticmethod
    def forward(ctx, x, narrow_x, narrow_y, keep, heads, w_norm, *weights):
        dispatch.remember(ctx)
        ctx.heads = heads
        t, *moments = norm(positions(x), w_norm, weights[0].dtype)
        *maps, smooth = _smooth(x, t, heads, *weights[:-1])
        ctx.save_for_backward(x, keep, w_norm, *weights, *moments, t, *maps, smooth)
        return _add(x, keep, smooth, weights[-1], torch.empty_like(x), narrow_y)

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad):
        x, keep, w_norm, *weights, mean, rstd, t, m, n, q, k, v, y, row_sum, smooth = (
            ctx.saved_tensors
        )
        w_in, w_q, w_k, w_v, w_smooth, w_out = weights
        grad_w_out = None
        grad = grad.contiguous()
        g_smooth = torch.empty_like(smooth)
        maps = map(positions, (grad, smooth, g_smooth))
        for keep_b, g, smooth_b, g_smooth_b in blocks(max(w_out.shape), keep, *maps):
            g = narrowed(g, keep_b, smooth.dtype)
            grad_w_out = added_outer(grad_w_out, g, smooth_b)
            torch.mm(g, w_out, out=g_smooth_b)
        g, grad_w_smooth = conv_backward(g_smooth, y, w_smooth)
        maps = (split_heads(a, ctx.heads) for a in (g, q, k, v, y))
        g_q, g_k, g_v = (merge_heads(g, x) for g in attention_backward(*maps, row_sum))
        g_m, grad_w_q = conv_backward(g_q, m, w_q)
        g_m, grad_w_k = conv_backward(g_k, m, w_k, plus=g_m)
        g_n, grad_w_v = conv_backward(g_v, n, w_v)
        g_m, g_n = positions(g_m), positions(g_n)
        grad_w_in = torch.empty_like(w_in)
        for g, half in zip((g_m, g_n), grad_w_in.chunk(2)):
            torch.mm(g.t(), t, out=half)
        of_m, of_n = w_in.chunk(2)
        g = g_m @ of_m
        torch.addmm(g, g_n, of_n, out=g)
        grad_x, grad_w_norm = add_norm_backward(
            g, None, positions(x), mean, rstd, w_norm, plus=positions(grad)
        )
        grad_x = grad_x.view_as(x)
        grads_of_convs = (grad_w_q, grad_w_k, grad_w_v, grad_w_smooth)
        return grad_x, None, None, None, None, grad_w_norm, grad_w_in, *grads_of_convs, grad_w_out


def _smooth(x, t, heads, w_in, w_q, w_k, w_v, w_smooth):
    """Return all maps from the products with w_in to smooth, and the row sums of attention."""
    m, n = (F.linear(t, half).view(*x.shape[:3], len(half)) for half in w_in.chunk(2))
    q, k, v = (conv(*pair) for pair in ((m, w_q), (m, w_k), (n, w_v)))
    y, row_sum = attention(*(split_heads(a, heads) for a in (q, k, v)))
    y = merge_heads(y, x)
    return m, n, q, k, v, y, row_sum, conv(y, w_smooth)


def _add(x, keep, smooth, w_out, y, narrow_y):
    """Write ``x + keep * smooth w_out^T`` to y, and to its narrow copy."""
    maps = map(positions, (x, smooth, y, narrow_y))
    for keep_b, x_b, smooth_b, y_b, narrow_b in blocks(max(w_out.shape), keep, *maps):
        add_product(x_b, smooth_b, w_out.t(), keep_b, out=y_b, narrow=narrow_b)
    return y
