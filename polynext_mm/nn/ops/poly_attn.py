"""PolyAttn, on the residual stream (paper, PolyAttn)::

    m, n = the halves of LN(x) W_in^T
    q, k, v = q_conv(m), k_conv(m), v_conv(n)
    x + keep * smooth(poly_attention(q, k, v)) W_out^T

``q_conv``, ``k_conv``, ``v_conv`` and ``smooth`` are depthwise convolutions.

The kernel is for CPUs: it keeps what autograd would, and costs fewer calls and passes. On other
devices the operations that it consists of have kernels of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .blocks import add_product, added_outer, blocks, narrowed, positions
from .depthwise import conv, conv_backward, depthwise
from .layer_norm import layer_norm
from .norms import add_norm_backward, norm
from .poly_attention import attention, attention_backward, poly_attention
from .precision import narrow
from .residual import residual


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
) -> Tensor:
    """Compute ``x + keep * smooth(poly_attention(q, k, v)) w_out^T``.

    Args:
        x: The residual stream, (B, H, W, C).
        keep: The factor of drop path, (B, 1, 1, 1), or None for 1.
        heads: Of attention.
        w_norm: (C,), or None for 1.
        w_in: (2E, C), E a multiple of ``heads``.
        w_q: (E, 1, S, S) with S odd, times the scale of the scores.
        w_k: (E, 1, S, S) with S odd.
        w_v: (E, 1, S, S) with S odd.
        w_smooth: (E, 1, S, S) with S odd.
        w_out: (C, E).
        out: Where the result may be written where no gradient is needed: contiguous, like ``x`` or
            ``x`` itself.

    Returns:
        The map (B, H, W, C) in the dtype of ``x``, new unless it is ``out``.
    """
    weights = narrow(x, w_norm, w_in, w_q, w_k, w_v, w_smooth, w_out)
    if x.device.type != 'cpu':
        return _by_operations(x, keep, heads, *weights)
    return dispatch.run_kernel(_Kernel, x, keep, heads, *weights, out=out)


def _by_operations(x, keep, heads, w_norm, w_in, w_q, w_k, w_v, w_smooth, w_out):
    t = layer_norm(x, w_norm).to(w_in.dtype)
    # Two products make both maps contiguous: a convolution would copy half of a map.
    qk, v = (F.linear(t, half) for half in w_in.chunk(2))
    q, k, v = (depthwise(*pair) for pair in ((qk, w_q), (qk, w_k), (v, w_v)))
    y = merge_heads(poly_attention(*(split_heads(a, heads) for a in (q, k, v))), x)
    return residual(x, F.linear(depthwise(y, w_smooth), w_out), None, keep)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View (B, H, W, E) as (B, heads, H * W, E / heads)."""
    return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """Return (B, H, W, E) of (B, heads, H * W, E / heads), with H and W of the map ``like``."""
    return x.transpose(1, 2).flatten(2).unflatten(1, like.shape[1:3])


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, keep, heads, w_norm, *weights, out=None):
        t = norm(positions(x), w_norm)[0].to(weights[0].dtype)
        smooth = _smooth(x, t, heads, *weights[:-1])[-1]
        return _add(x, keep, smooth, weights[-1], torch.empty_like(x) if out is None else out)

    @staticmethod
    def forward(ctx, x, keep, heads, w_norm, *weights):
        dispatch.remember(ctx)
        ctx.heads = heads
        normed, *moments = norm(positions(x), w_norm)
        t = normed.to(weights[0].dtype)
        *maps, smooth = _smooth(x, t, heads, *weights[:-1])
        ctx.save_for_backward(x, keep, w_norm, *weights, *moments, t, *maps, smooth)
        return _add(x, keep, smooth, weights[-1], torch.empty_like(x))

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
        grad_w_in = torch.cat([added_outer(None, g, t) for g in (g_m, g_n)])
        of_m, of_n = w_in.chunk(2)
        g = torch.addmm(g_m @ of_m, g_n, of_n).to(x.dtype)
        g, grad_w_norm = add_norm_backward(g, None, positions(x), mean, rstd, w_norm)
        grad_x = g.view_as(x).add_(grad)
        grads_of_convs = (grad_w_q, grad_w_k, grad_w_v, grad_w_smooth)
        return grad_x, None, None, grad_w_norm, grad_w_in, *grads_of_convs, grad_w_out


def _smooth(x, t, heads, w_in, w_q, w_k, w_v, w_smooth):
    """Return all maps from the products with w_in to smooth, and the row sums of attention."""
    m, n = (F.linear(t, half).view(*x.shape[:3], len(half)) for half in w_in.chunk(2))
    q, k, v = (conv(*pair) for pair in ((m, w_q), (m, w_k), (n, w_v)))
    y, row_sum = attention(*(split_heads(a, heads) for a in (q, k, v)))
    y = merge_heads(y, x)
    return m, n, q, k, v, y, row_sum, conv(y, w_smooth)


def _add(x, keep, smooth, w_out, y):
    """Write ``x + keep * smooth w_out^T`` to y."""
    maps = map(positions, (x, smooth, y))
    for keep_b, x_b, smooth_b, y_b in blocks(max(w_out.shape), keep, *maps):
        add_product(x_b, smooth_b, w_out.t(), keep_b, out=y_b)
    return y
