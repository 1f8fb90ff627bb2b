"""The two sums of polynomial attention, undivided, for every query i::

    a_ij  = (1 + q_i . k_j)^4
    out_i = sum_j a_ij v_j
    sum_i = sum_j a_ij

A fully polynomial network divides the first not by the second but by its average over a batch, so
both carry gradient here, whereas :mod:`~polynext_mm.nn.ops.poly_attention` returns their quotient.
The kernel computes the same blocks of scores: memory is linear in the number of tokens.
"""

import torch
from torch import Tensor

from . import dispatch
from .operators import operator
from .poly_attention_blocks import sums, sums_backward
from .precision import wide, wide_dtype


def poly_attention_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sum values and weights over the keys, with the weights ``(1 + q k^T)^4``.

    Args:
        q: Queries, already multiplied by the scale, (..., tokens, head width).
        k: Keys, (..., tokens, head width).
        v: Values, (..., tokens, value width).

    Returns:
        The sums of values, (..., tokens, value width), and of weights, (..., tokens), in float32
        (float64 for float64 inputs). Half-precision inputs are multiplied in their own dtype, on
        CPUs in float32.
    """
    return dispatch.run_operator(plain, _in_blocks, q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same with the whole (tokens x tokens) matrix."""
    r = wide(q @ k.transpose(-2, -1)) + 1
    if q.dtype is torch.float16:  # 16 to the fourth power is about its largest number
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


def _like_forward(q, k, v):
    return (
        v.new_empty(*q.shape[:2], v.shape[2], dtype=wide_dtype(v)),
        q.new_empty(*q.shape[:2], 1, dtype=wide_dtype(q)),
    )


def _like_backward(grad, grad_total, q, k, v):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (width + v_shape[-1])


def _flops_backward(grad_shape, grad_total_shape, q_shape, k_shape, v_shape, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (3 * width + 2 * v_shape[-1])


@operator('poly_attention_sums_backward', _like_backward, _flops_backward)
def _backward_op(
    grad: Tensor, grad_total: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return sums_backward(grad, grad_total, q, k, v, undivided=True)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad, grad_total):
    return _backward_op(grad.contiguous(), grad_total.contiguous(), *ctx.saved_tensors)


@operator('poly_attention_sums', _like_forward, _flops, _setup_context, _backward)
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return sums(q, k, v, undivided=True)
