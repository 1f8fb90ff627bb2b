"""PolyConv, on the residual stream (paper, PolyConv)::

    b = x W_in^T
    x + keep * LN(smooth(coarse(b) * swap(fine(b))) W_out^T)

``coarse``, ``fine`` and ``smooth`` are depthwise convolutions, the first with dilation 2; ``swap``
exchanges partners (:func:`partner_order`).

For backward the kernel keeps x, in the dtype of the products, five more maps and the moments of the
norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .blocks import add_product, added, added_outer, bands, blocks, joined, positions
from .depthwise import conv, conv_backward, conv_backward_of_weight, conv_backward_of_x
from .norms import add_norm, add_norm_backward
from .stream import NarrowStream, run_branch

partners_triton = dispatch.triton_module('partners_triton')


def add_poly_conv(
    x: Tensor,
    keep: Tensor | None,
    w_in: Tensor,
    w_coarse: Tensor,
    w_fine: Tensor,
    w_smooth: Tensor,
    w_out: Tensor,
    w_norm: Tensor,
    out: Tensor | None = None,
    stream: NarrowStream | None = None,
) -> Tensor:
    """Compute ``x + keep * LN(smooth(coarse(b) * swap(fine(b))) w_out^T)`` with ``b = x w_in^T``.

    Args:
        x: The residual stream, (B, H, W, C). Weights are in the dtype of products on it, except the
            norm's, which is wide; they may be copies (:mod:`~polynext_mm.nn.ops.ready`).
        keep: The drop path factor, (B, 1, 1, 1), or None for 1.
        w_in: (K, C).
        w_coarse: (K, 1, S, S) with S odd; the convolution has dilation 2.
        w_fine: (K, 1, S, S) with S odd.
        w_smooth: (K, 1, S, S) with S odd.
        w_out: (C, K).
        w_norm: (C,).
        out: Where the result may be written if no gradient is needed: contiguous, like ``x`` or
            ``x`` itself.
        stream: Where narrow copies of the residual stream come from and go to, or None.

    Returns:
        The map (B, H, W, C) in the dtype of ``x``, new unless it is ``out``.
    """
    weights = w_in, w_coarse, w_fine, w_smooth, w_out, w_norm
    return run_branch(_Kernel, x, keep, weights=weights, out=out, stream=stream)


def partner_order(channels: int) -> Tensor:
    """Return the paper's inner channels of a PolyConv in the order that they have here.

    The paper multiplies channel i of one map by channel K - 1 - i of the other. Here the second
    half of the channels is stored in reverse, so that partners are K/2 apart: two halves are
    multiplied crosswise, and no map is reversed. If K is odd, the middle channel, which is its own
    partner, comes last.

    Args:
        channels: K.

    Returns:
        Indices of the paper's channels, (K,).
    """
    half = channels // 2
    order = torch.arange(channels)
    return torch.cat((order[:half], order.flip(0)[:half], order[half : channels - half]))


def swap_partners(x: Tensor) -> Tensor:
    """Exchange the partners among the channels of (B, H, W, K); see :func:`partner_order`."""
    half = x.shape[-1] // 2
    swapped = x[..., : 2 * half].unflatten(-1, (2, half)).flip(-2).flatten(-2)
    return swapped if x.shape[-1] == 2 * half else torch.cat((swapped, x[..., 2 * half :]), -1)


def _partners(channels):
    """Return slices of channels, each with the slice of its partners."""
    half = channels // 2
    first, second, middle = slice(half), slice(half, 2 * half), slice(2 * half, channels)
    pairs = [(first, second), (second, first)]
    return pairs if channels % 2 == 0 else pairs + [(middle, middle)]


def _times_swapped(x, y, out=None):
    """Compute ``x * swap(y)`` of (B, H, W, K); ``out`` may be x."""
    out = torch.empty_like(x) if out is None else out
    if dispatch.by_triton(partners_triton, x, y, out):
        partners_triton.times_swapped(x, y, out)
        return out
    for own, partner in _partners(x.shape[-1]):
        torch.mul(x[..., own], y[..., partner], out=out[..., own])
    return out


def _through_smooth(grad, x, y, weight):
    """Return the gradients of x, y and the weight in ``smooth(x * swap(y))``."""
    if dispatch.by_triton(partners_triton, grad, x, y):  # this computes the product too
        grad = conv_backward_of_x(grad_of_smooth := grad, x, weight)
        grad_x, grad_y, product = partners_triton.times_swapped_backward(grad, x, y)
        return grad_x, grad_y, conv_backward_of_weight(grad_of_smooth, product, weight)
    grad, grad_weight = conv_backward(grad, _times_swapped(x, y), weight)
    grad_y = torch.empty_like(y)
    for own, partner in _partners(x.shape[-1]):
        torch.mul(grad[..., partner], x[..., partner], out=grad_y[..., own])
    return _times_swapped(grad, y, out=grad), grad_y, grad_weight


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(
        x, narrow_x, narrow_y, keep, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm, out=None
    ):
        y = torch.empty_like(x) if out is None else out
        b = F.linear(x.to(w_in.dtype) if narrow_x is None else narrow_x, w_in)
        reach = max(w_coarse.shape[-1] - 1, w_fine.shape[-1] // 2) + w_smooth.shape[-1] // 2
        for samples, rows in bands(w_in.shape[0], x):
            # The convolutions of a band read beyond its rows.
            first = max(rows.start, reach) - reach
            seen = b[samples, first : rows.stop + reach]
            coarse = conv(seen, w_coarse, dilation=2)
            product = _times_swapped(coarse, conv(seen, w_fine), out=coarse)
            smooth = conv(product, w_smooth)[:, rows.start - first : rows.stop - first]
            factor = None if keep is None else keep[samples]
            branch = F.linear(smooth, w_out)
            x_b, y_b = x[samples, rows], y[samples, rows]
            narrow_b = None if narrow_y is None else narrow_y[samples, rows]
            add_norm(x_b, branch, factor, w_norm, out=y_b, narrow=narrow_b)
        return y

    @staticmethod
    def forward(ctx, x, narrow_x, narrow_y, keep, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        dispatch.remember(ctx)
        narrow_x = x.to(w_in.dtype) if narrow_x is None else narrow_x
        b = F.linear(narrow_x, w_in)
        coarse, fine = conv(b, w_coarse, dilation=2), conv(b, w_fine)
        smooth = conv(_times_swapped(coarse, fine), w_smooth)
        y, z, moments = torch.empty_like(x), torch.empty_like(narrow_x), []
        maps = map(positions, (x, y, narrow_y, smooth, z))
        for keep_b, x_b, y_b, narrow_b, smooth_b, z_b in blocks(max(w_out.shape), keep, *maps):
            torch.mm(smooth_b, w_out.t(), out=z_b)
            moments.append(add_norm(x_b, z_b, keep_b, w_norm, out=y_b, narrow=narrow_b))
        weights = (w_in, w_coarse, w_fine, w_smooth, w_out, w_norm)
        moments = map(joined, zip(*moments))
        ctx.save_for_backward(narrow_x, keep, *weights, b, coarse, fine, smooth, z, *moments)
        return y

    @staticmethod
    @dispatch.backward
    def backward(ctx, grad):
        x, keep, *weights, b, coarse, fine, smooth, z, mean, rstd = ctx.saved_tensors
        w_in, w_coarse, w_fine, w_smooth, w_out, w_norm = weights
        grad_w_out = grad_w_norm = None
        grad = grad.contiguous()
        g_smooth = torch.empty_like(smooth)
        maps = map(positions, (grad, z, smooth, g_smooth))
        maps = (*maps, mean, rstd)
        for keep_b, g, z_b, smooth_b, g_smooth_b, mean_b, rstd_b in blocks(
            max(w_out.shape), keep, *maps
        ):
            g, part = add_norm_backward(g, keep_b, z_b, mean_b, rstd_b, w_norm)
            grad_w_norm = added(grad_w_norm, part)
            grad_w_out = added_outer(grad_w_out, g, smooth_b)
            torch.mm(g, w_out, out=g_smooth_b)
        g_coarse, g_fine, grad_w_smooth = _through_smooth(g_smooth, coarse, fine, w_smooth)
        del g_smooth  # before more maps are allocated
        g, grad_w_fine = conv_backward(g_fine, b, w_fine)
        g, grad_w_coarse = conv_backward(g_coarse, b, w_coarse, dilation=2, plus=g)
        g = positions(g)
        grad_w_in = added_outer(None, g, positions(x))
        grad_x = torch.empty_like(grad)
        add_product(positions(grad), g, w_in, None, out=positions(grad_x))
        grads_of_convs = (grad_w_coarse, grad_w_fine, grad_w_smooth)
        return grad_x, None, None, None, grad_w_in, *grads_of_convs, grad_w_out, grad_w_norm
