"""Polynomial attention (paper, PolyAttn), for every query i::

    a_ij  = (1 + q_i . k_j)^4
    out_i = sum_j a_ij v_j / sum_j a_ij

The quotient needs no normalized matrix, so the kernel computes blocks of scores, uses them and
discards them (:mod:`~polynext_mm.nn.ops.poly_attention_blocks`). For backward it keeps q, k, v, the
output and one row sum per query. Both directions are operators of ``torch.library``: in a compiled
graph a Python loop over blocks would be recompiled for every size, and an operator without a
formula would count as no FLOPs.

On GPUs :mod:`~polynext_mm.nn.ops.poly_attention_triton` does the same, if Triton is available and
supports the dtype.
"""

import torch
from torch import Tensor

from . import dispatch
from .operators import operator
from .poly_attention_blocks import EPS, sums, sums_backward
from .precision import wide, wide_dtype

poly_attention_triton = dispatch.triton_module('poly_attention_triton')


def poly_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the weights ``(1 + q k^T)^4``, normalized over the keys.

    Args:
        q: Queries, already multiplied by the scale, (..., tokens, head width).
        k: Keys, (..., tokens, head width).
        v: Values, (..., tokens, value width).

    Returns:
        (..., tokens, value width) in the dtype of ``v``. float16 and bfloat16 inputs are multiplied
        in their own dtype, on CPUs in float32; the power, the sums and the division are float32.
    """
    return dispatch.run_operator(plain, _kernel, q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same with the whole (tokens x tokens) matrix."""
    a = wide(q @ k.transpose(-2, -1)).add(1)
    if q.dtype is torch.float16:  # 16 to the fourth power is about its largest number
        a = a / a.abs().amax(-1, keepdim=True).clamp_min(EPS)
    a = a.square().square()
    out = wide(a.to(v.dtype) @ v) / a.sum(-1, keepdim=True).clamp_min(EPS)
    return out.to(v.dtype)


def _kernel(q, k, v):
    return attention(q, k, v)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with the kernels, and also return what backward needs of the row sums."""
    if dispatch.by_triton(poly_attention_triton, q, k, v):
        return poly_attention_triton.attend(q, k, v, EPS)
    out, row_sum = _forward_op(*map(_heads, (q, k, v)))
    return out.reshape(*q.shape[:-1], v.shape[-1]), row_sum


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, for kernels with their own backward."""
    if dispatch.by_triton(poly_attention_triton, q, k, v):
        return poly_attention_triton.attend_backward(grad, q, k, v, out, row_sum)
    grads = _backward_op(*map(_heads, (grad, q, k, v, out)), row_sum)
    return tuple(g.reshape(t.shape) for g, t in zip(grads, (q, k, v)))


def _heads(x: Tensor) -> Tensor:
    """View (..., tokens, width) as (heads, tokens, width)."""
    return x.reshape(-1, *x.shape[-2:])


def _like_forward(q, k, v):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[0], q.shape[1], 1, dtype=wide_dtype(q)),
    )


def _like_backward(grad, q, k, v, out, row_sum):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (width + v_shape[-1])


def _flops_backward(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (3 * width + 2 * v_shape[-1])


@operator('poly_attention_backward', _like_backward, _flops_backward)
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    share = grad / row_sum
    of_row_sum = (share * out).sum(-1, keepdim=True).neg_()
    return sums_backward(share, of_row_sum, q, k, v)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return _backward_op(grad.contiguous(), *ctx.saved_tensors)


@operator('poly_attention', _like_forward, _flops, _setup_context, _backward)
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, row_sum = sums(q, k, v)
    out.div_(row_sum.clamp_min_(EPS))
    return out.to(v.dtype), row_sum
