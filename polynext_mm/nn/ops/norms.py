"""Layer norms fused with what comes before or after them in a network, in both directions.

These are pieces of kernels: autograd does not see them. Maps are (..., C), contiguous or parts of
contiguous maps, and a norm is over the last dimension, without a bias. On GPUs every function is
one kernel (:mod:`~polynext_mm.nn.ops.norms_triton`), plus a sum in backward, if Triton is available
and supports the tensors.

A weight may come in copies (:mod:`~polynext_mm.nn.ops.ready`); then so does its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .blocks import add_branch, narrowed
from .precision import LN_EPS, Like, wide, wide_dtype
from .ready import grad_of, one

norms_triton = dispatch.triton_module('norms_triton')


def copies(x: Tensor | Like, width: int) -> int:
    """Return how many partial sums make up the gradient of a norm's weight, for a map (..., C).

    Args:
        x: A map with the same number of positions.
        width: Of the norm.

    Returns:
        Their number, or 0 if the gradient is computed as a whole.
    """
    if not dispatch.triton_wanted(norms_triton):
        return 0
    return norms_triton.programs(x, width)


def norm_of_product(halves: Tensor, weight: Tensor | None) -> Tensor:
    """Return ``LN(u * v)`` of the halves u and v of (..., 2E): (..., E)."""
    weight = one(weight, 1)
    if dispatch.by_triton(norms_triton, halves.shape[-1] // 2, [halves], [weight]):
        return norms_triton.norm_of_product(halves, weight)
    u, v = halves.chunk(2, -1)
    return norm(u * v, weight)[0]


def norm_of_product_backward(
    grad: Tensor, halves: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``LN(u * v)`` again, and the gradients of the halves and of the weight."""
    whole, weight = weight, one(weight, 1)
    if dispatch.by_triton(norms_triton, grad.shape[-1], [grad, halves], [weight]):
        normed, grad_halves, sums = norms_triton.norm_of_product_backward(grad, halves, weight)
        return normed, grad_halves, grad_of(whole, sums)
    u, v = halves.chunk(2, -1)
    product = u * v
    normed, mean, rstd = norm(product, weight)
    grad, of_weight = _norm_backward(grad, product, mean, rstd, whole)
    grad_halves = torch.empty_like(halves)
    g_u, g_v = grad_halves.chunk(2, -1)
    torch.mul(grad, v, out=g_u)
    torch.mul(grad, u, out=g_v)
    return normed, grad_halves, of_weight


def norm(
    x: Tensor, weight: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``LN(x)``, in a dtype, and the moments of x: means and reciprocal deviations."""
    weight = one(weight, 1)
    if dispatch.by_triton(norms_triton, x.shape[-1], [x], [weight]):
        out = torch.empty_like(x, dtype=dtype)
        return out, *norms_triton.add_norm(None, x, None, weight, out, None)
    weight = _norm_weight(x, weight)
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, None, LN_EPS)
    return out.to(dtype or x.dtype), mean, rstd


def add_norm(
    x: Tensor,
    z: Tensor,
    keep: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    narrow: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``out = x + keep * LN(z)``; ``out`` may be ``x``, and ``narrow`` is a copy of it.

    Returns:
        The moments of z: means and reciprocal deviations.
    """
    weight = one(weight, 1)
    maps = [z, x, out] if narrow is None else [z, x, out, narrow]
    if dispatch.by_triton(norms_triton, z.shape[-1], maps, [weight], keep):
        return norms_triton.add_norm(x, z, keep, weight, out, narrow)
    branch, mean, rstd = norm(z, weight)
    add_branch(x, branch, keep, out=out, narrow=narrow)
    return mean, rstd


def add_norm_backward(
    grad: Tensor,
    keep: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of z, to which ``plus`` is added, and of the weight.

    That of x is ``grad``.
    """
    single = one(weight, 1)
    maps = [z, grad] if plus is None else [z, grad, plus]
    if dispatch.by_triton(norms_triton, z.shape[-1], maps, [single], keep):
        grad_z, sums = norms_triton.add_norm_backward(grad, keep, z, mean, rstd, single, plus)
        return grad_z, grad_of(weight, sums)
    grad_z, of_weight = _norm_backward(narrowed(grad, keep, z.dtype), z, mean, rstd, weight)
    return grad_z if plus is None else grad_z.add_(plus), of_weight


def norm_of_sum(
    s0: Tensor, s1: Tensor, a0: Tensor, a1: Tensor, weight: Tensor, narrow: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``LN(total)``, the total ``a0 * s0 + a1 * s1`` and its moments.

    The first is written to ``narrow`` as well.
    """
    a0, a1, weight = (one(w, 1) for w in (a0, a1, weight))
    maps = [s0, s1] if narrow is None else [s0, s1, narrow]
    if dispatch.by_triton(norms_triton, s0.shape[-1], maps, [a0, a1, weight]):
        return norms_triton.norm_of_sum(s0, s1, a0, a1, weight, narrow)
    total = torch.addcmul(a0 * s0, a1, s1)
    normed, mean, rstd = norm(total, weight)
    if narrow is not None:
        narrow.copy_(normed)
    return normed, total, mean, rstd


def norm_of_sum_backward(
    grad: Tensor,
    total: Tensor,
    moments: tuple[Tensor, Tensor],
    pair: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    weight: Tensor,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write the gradients of the pair s0 and s1; return those of a0, a1 and the weight."""
    singles = [one(w, 1) for w in (*scales, weight)]
    if dispatch.by_triton(norms_triton, grad.shape[-1], [*pair, grad], singles):
        sums = norms_triton.norm_of_sum_backward(grad, total, *moments, *pair, *singles, *out)
        if one(weight, 1) is weight:
            sums = sums.sum(0, keepdim=True)  # of all three at once
        return tuple(grad_of(w, of_w) for w, of_w in zip((*scales, weight), sums.unbind(1)))
    grad, of_weight = _norm_backward(grad, total, *moments, weight)
    for scale, grad_s in zip(singles, out):
        torch.mul(grad, scale, out=grad_s)
    of_scales = (grad_of(scale, (grad * s).sum(0)[None]) for scale, s in zip(scales, pair))
    return *of_scales, of_weight


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    grad_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad,
        x,
        x.shape[-1:],
        mean,
        rstd,
        _norm_weight(x, one(weight, 1)),
        None,
        [True, weight is not None, False],
    )
    return grad_x, None if of_weight is None else grad_of(weight, of_weight[None])


def _norm_weight(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return the weight in the dtype that makes the moments wide.

    On a CPU the moments have the dtype of the weight; on a GPU they are wide, and the weight must
    have the dtype of the map.
    """
    if x.device.type == 'cpu':
        return x.new_ones(x.shape[-1], dtype=wide_dtype(x)) if weight is None else wide(weight)
    return None if weight is None else weight.to(x.dtype)
