"""Layer norms together with what stands next to them in a network, in both directions.

These are pieces of kernels: autograd does not see them. Maps are (..., C), contiguous or parts of
contiguous maps, and a norm is over the last dimension, without a bias. On GPUs every function is
one kernel (:mod:`~polynext_mm.nn.ops.norms_triton`), and a sum in backward, where Triton is there
and takes the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .blocks import add_branch, narrowed
from .precision import LN_EPS, wide, wide_dtype

norms_triton = dispatch.triton_module('norms_triton')


def norm_of_product(halves: Tensor, weight: Tensor | None) -> Tensor:
    """Return ``LN(u * v)`` of the halves u and v of (..., 2E): (..., E)."""
    if dispatch.by_triton(norms_triton, halves.shape[-1] // 2, [halves], [weight]):
        return norms_triton.norm_of_product(halves, weight)
    u, v = halves.chunk(2, -1)
    return norm(u * v, weight)[0]


def norm_of_product_backward(
    grad: Tensor, halves: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``LN(u * v)`` once more, and the gradients of the halves and of the weight."""
    if dispatch.by_triton(norms_triton, grad.shape[-1], [grad, halves], [weight]):
        normed, grad_halves, of_weight = norms_triton.norm_of_product_backward(grad, halves, weight)
        return normed, grad_halves, None if weight is None else of_weight
    u, v = halves.chunk(2, -1)
    product = u * v
    normed, mean, rstd = norm(product, weight)
    grad, of_weight = _norm_backward(grad, product, mean, rstd, weight)
    grad_halves = torch.empty_like(halves)
    g_u, g_v = grad_halves.chunk(2, -1)
    torch.mul(grad, v, out=g_u)
    torch.mul(grad, u, out=g_v)
    return normed, grad_halves, of_weight


def norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``LN(x)`` and the moments of x: means and reciprocal deviations."""
    if dispatch.by_triton(norms_triton, x.shape[-1], [x], [weight]):
        out = torch.empty_like(x)
        return out, *norms_triton.add_norm(None, x, None, weight, out)
    return torch.native_layer_norm(x, x.shape[-1:], _norm_weight(x, weight), None, LN_EPS)


def add_norm(
    x: Tensor, z: Tensor, keep: Tensor | None, weight: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``out = x + keep * LN(z)``; ``out`` may be ``x``.

    Returns:
        The moments of z: means and reciprocal deviations.
    """
    if dispatch.by_triton(norms_triton, z.shape[-1], [z, x, out], [weight], keep):
        return norms_triton.add_norm(x, z, keep, weight, out)
    branch, mean, rstd = norm(z, weight)
    add_branch(x, branch, keep, out=out)
    return mean, rstd


def add_norm_backward(
    grad: Tensor,
    keep: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of z and of the weight; that of x is ``grad``."""
    if dispatch.by_triton(norms_triton, z.shape[-1], [z, grad], [weight], keep):
        grad_z, of_weight = norms_triton.add_norm_backward(grad, keep, z, mean, rstd, weight)
        return grad_z, None if weight is None else of_weight
    return _norm_backward(narrowed(grad, keep, z.dtype), z, mean, rstd, weight)


def norm_of_sum(
    s0: Tensor, s1: Tensor, a0: Tensor, a1: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``LN(total)``, the total ``a0 * s0 + a1 * s1`` and its moments."""
    if dispatch.by_triton(norms_triton, s0.shape[-1], [s0, s1], [a0, a1, weight]):
        return norms_triton.norm_of_sum(s0, s1, a0, a1, weight)
    total = torch.addcmul(a0 * s0, a1, s1)
    normed, mean, rstd = norm(total, weight)
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
    if dispatch.by_triton(norms_triton, grad.shape[-1], [*pair, grad], [*scales, weight]):
        of_three = norms_triton.norm_of_sum_backward(
            *(grad, total, *moments, *pair, *scales, weight, *out)
        )
        of_a0, of_a1, of_w = of_three.unbind()
        return of_a0.to(scales[0].dtype), of_a1.to(scales[1].dtype), of_w.to(weight.dtype)
    grad, of_weight = _norm_backward(grad, total, *moments, weight)
    for scale, grad_s in zip(scales, out):
        torch.mul(grad, scale, out=grad_s)
    return (grad * pair[0]).sum(0), (grad * pair[1]).sum(0), of_weight


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    grad_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad,
        x,
        x.shape[-1:],
        mean,
        rstd,
        _norm_weight(x, weight),
        None,
        [True, weight is not None, False],
    )
    return grad_x, of_weight


def _norm_weight(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return the weight in the dtype that makes the moments wide.

    On a CPU the moments have the dtype of the weight; on a GPU they are wide, and the weight must
    have the dtype of the map.
    """
    if x.device.type == 'cpu':
        return x.new_ones(x.shape[-1], dtype=wide_dtype(x)) if weight is None else wide(weight)
    return None if weight is None else weight.to(x.dtype)
