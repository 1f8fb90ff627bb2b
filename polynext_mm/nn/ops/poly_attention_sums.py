"""The two sums of polynomial attention, undivided, for every query i::

    a_ij  = (1 + q_i . k_j)^4
    out_i = sum_j a_ij v_j
    sum_i = sum_j a_ij

A fully polynomial network divides the first not by the second but by its average over a batch, so
both carry gradient here, whereas :mod:`~polynext_mm.nn.ops.poly_attention` returns their quotient.
The kernel forms the same blocks of scores as there: memory is linear in the number of tokens.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .poly_attention import (
    _accumulate,
    _blocks,
    _cut,
    _Memory,
    _product_plus,
    _scores,
    _shared,
    _with_ones,
)
from .precision import wide, wide_dtype


def poly_attention_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sum values and weights over the keys, with the weights ``(1 + q k^T)^4``.

    Args:
        q: Queries, already multiplied by the scale, (..., tokens, head width).
        k: Keys, (..., tokens, head width).
        v: Values, (..., tokens, value width).

    Returns:
        The sums of values, (..., tokens, value width), and of weights, (..., tokens), in float32
        (float64 for float64 inputs). Half-precision inputs are multiplied in their own dtype.
    """
    return dispatch.run_operator(plain, _in_blocks, q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same with the whole (tokens x tokens) matrix."""
    r = wide(q @ k.transpose(-2, -1)) + 1
    if q.dtype is torch.float16:  # the fourth power of 16 is its largest number
        top = r.detach().abs().amax(-1, keepdim=True)
        r, factor = r / top, top.square().square()
    else:
        factor = None
    a = r * r
    a = a * a
    out, total = wide(a.to(v.dtype) @ v), a.sum(-1)
    return (out, total) if factor is None else (out * factor, total * factor[..., 0])


def _in_blocks(q, k, v):
    out, total = _forward_op(*(t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)))
    return out.reshape(*q.shape[:-1], v.shape[-1]), total.reshape(q.shape[:-1])


@torch.library.custom_op('polynext_mm::poly_attention_sums', mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = v.new_empty(*q.shape[:2], v.shape[2], dtype=wide_dtype(v))
    total = q.new_empty(*q.shape[:2], 1, dtype=wide_dtype(q))
    k, memory = _with_ones(k), _Memory()
    for heads, queries, parts in _blocks(q, k.shape[1]):
        r, top = _scores(_cut(q[heads, queries], parts), _shared(k[heads], parts), memory)
        a = r.square_().square_()
        out_b, total_b = (_cut(t[heads, queries], parts) for t in (out, total))
        torch.sum(a, -1, keepdim=True, out=total_b)
        out_b.copy_(torch.bmm(a.to(v.dtype), _shared(v[heads], parts)))
        if isinstance(top, Tensor):
            factor = top.square().square()
            out_b.mul_(factor)
            total_b.mul_(factor)
    return out, total


@_forward_op.register_fake
def _(q, k, v):
    return (
        v.new_empty(*q.shape[:2], v.shape[2], dtype=wide_dtype(v)),
        q.new_empty(*q.shape[:2], 1, dtype=wide_dtype(q)),
    )


@torch.library.custom_op('polynext_mm::poly_attention_sums_backward', mutates_args=())
def _backward_op(
    grad: Tensor, grad_total: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(k, dtype=wide_dtype(k), memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, dtype=wide_dtype(v), memory_format=torch.contiguous_format)
    k_ones, v_ones = _with_ones(k), _with_ones(v)
    of_scores, of_slope, of_square = _Memory(), _Memory(), _Memory()
    for heads, queries, parts in _blocks(q, k.shape[1]):
        q_b, grad_b, grad_total_b = (_cut(t[heads, queries], parts) for t in (q, grad, grad_total))
        k_ones_b, v_ones_b, k_b = (_shared(t[heads], parts) for t in (k_ones, v_ones, k))
        r, top = _scores(q_b, k_ones_b, of_scores)
        # d / d r_ij = 4 r_ij^3 (grad_i . v_j + grad_total_i), with r divided by top in half
        cube, fourth = top**3, top**4
        steep = (grad_b * (4 * cube)).to(v.dtype)
        slope = _product_plus(steep, grad_total_b * (4 * cube), v_ones_b, of_slope)
        square = torch.mul(r, r, out=of_square.of(r.shape, r))
        slope = slope.mul_(r.mul_(square)).to(q.dtype)
        torch.bmm(slope, k_b, out=_cut(grad_q[heads, queries], parts))
        _accumulate(grad_k[heads], slope.transpose(1, 2), q_b)
        a = square.square_().to(v.dtype)
        _accumulate(grad_v[heads], a.transpose(1, 2), (grad_b * fourth).to(v.dtype))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_backward_op.register_fake
def _(grad, grad_total, q, k, v):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad, grad_total):
    return _backward_op(grad.contiguous(), grad_total.contiguous(), *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.polynext_mm.poly_attention_sums)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (width + v_shape[-1])


@register_flop_formula(torch.ops.polynext_mm.poly_attention_sums_backward)
def _(grad_shape, grad_total_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (3 * width + 2 * v_shape[-1])
