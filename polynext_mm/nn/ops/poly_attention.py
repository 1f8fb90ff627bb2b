"""Polynomial attention (paper, PolyAttn), for every query i::

    a_ij  = (1 + q_i . k_j)^4
    out_i = sum_j a_ij v_j / sum_j a_ij

The quotient needs no normalized matrix, so the kernel forms blocks of scores, uses them and
forgets them: memory is linear in the number of tokens. For backward it keeps q, k, v, the output
and one row sum per query, and forms the blocks again. Both directions are operators of
``torch.library``: in a compiled graph a Python loop over blocks would be compiled anew for every
size, and an operator without a formula would count as no operations.

On GPUs the same is done by :mod:`~polynext_mm.nn.ops.poly_attention_triton`, where Triton is there
and takes the dtype.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .precision import wide, wide_dtype

poly_attention_triton = dispatch.triton_module('poly_attention_triton')

EPS = 1e-12  # the smallest divisor, as in the authors' release

# Elements of the block of scores held at a time. On a CPU that is for each thread, so that its
# share stays in its private cache; on a GPU in all, enough to fill the device.
THREAD_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 26


def poly_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the weights ``(1 + q k^T)^4``, normalized over the keys.

    Args:
        q: Queries, already multiplied by the scale, (..., tokens, head width).
        k: Keys, (..., tokens, head width).
        v: Values, (..., tokens, value width).

    Returns:
        (..., tokens, value width) in the dtype of ``v``. float16 and bfloat16 inputs are multiplied
        in their own dtype; the power, the sums and the division are float32.
    """
    return dispatch.run_operator(plain, _kernel, q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same with the whole (tokens x tokens) matrix."""
    a = wide(q @ k.transpose(-2, -1)).add(1)
    if q.dtype is torch.float16:  # the fourth power of 16 is its largest number
        a = a / a.abs().amax(-1, keepdim=True).clamp_min(EPS)
    a = a.square().square()
    out = wide(a.to(v.dtype) @ v) / a.sum(-1, keepdim=True).clamp_min(EPS)
    return out.to(v.dtype)


def _kernel(q, k, v):
    if dispatch.by_triton(poly_attention_triton, q, k, v):
        return poly_attention_triton.attend(q, k, v, EPS)
    return _in_blocks(q, k, v)


def _in_blocks(q, k, v):
    out, _ = _forward_op(*(t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)))
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _blocks(q: Tensor, keys: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield the heads and the queries of each block of scores: several heads, or queries of one.

    The third value is the number of parts that a block of one head is cut into, one for each thread
    of a CPU, so that a thread finds in its cache what it wrote there.
    """
    heads, tokens, _ = q.shape
    parts = torch.get_num_threads() if q.device.type == 'cpu' else 1
    budget = parts * THREAD_BLOCK if q.device.type == 'cpu' else DEVICE_BLOCK
    whole = budget // (tokens * keys)
    if whole:
        for head in range(0, heads, whole):
            yield slice(head, head + whole), slice(tokens), 1
        return
    size = max(1, budget // (keys * parts)) * parts
    starts = [*range(0, tokens - tokens % parts, size), tokens - tokens % parts]
    for head in range(heads):
        for start, stop in zip(starts, starts[1:]):
            yield slice(head, head + 1), slice(start, stop), parts
        if starts[-1] < tokens:
            yield slice(head, head + 1), slice(starts[-1], tokens), 1


class _Memory:
    """Memory that one intermediate of every block is written to, in turn.

    Fresh memory costs page faults. With this and :func:`_product_plus`, attention over 1024 tokens
    takes .91 of the time forward and .75 backward (float32, one core).
    """

    def __init__(self):
        self._flat = None

    def of(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return the same memory as before. No later block is larger than the first."""
        if self._flat is None:
            self._flat = like.new_empty(math.prod(shape))
        return self._flat[: math.prod(shape)].view(shape)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` in that memory."""
        return torch.bmm(a, b, out=self.of((len(a), a.shape[1], b.shape[2]), a))


def _cut(x: Tensor, parts: int) -> Tensor:
    """View a block (heads, queries, C) of one head as (parts, queries / parts, C)."""
    return x if parts == 1 else x[0].unflatten(0, (parts, -1))


def _shared(x: Tensor, parts: int) -> Tensor:
    """Expand what is (1, keys, C) to all parts."""
    return x if parts == 1 else x.expand(parts, -1, -1)


def _with_ones(x: Tensor) -> Tensor:
    """Append a column of ones to (heads, keys, C), for :func:`_product_plus`; not in half."""
    return F.pad(x, (0, 1), value=1.0) if x.dtype == wide_dtype(x) else x


def _product_plus(a: Tensor, bias: Tensor, b: Tensor, memory: _Memory) -> Tensor:
    """Return ``a b^T + bias`` in float32 or wider, for a bias per row.

    The bias becomes one more column of the product, which saves a pass over the block. In half
    that would round the sum, and so it is added to the wider product.

    Args:
        a: (parts, queries, C).
        bias: (parts, queries, 1), or what expands to that.
        b: (parts, keys, C), from :func:`_with_ones`.
        memory: For the product.
    """
    if a.dtype != wide_dtype(a):
        return wide(memory.product(a, b.transpose(1, 2))).add_(bias)
    a = torch.cat((a, bias.expand(*a.shape[:2], 1)), -1)
    return memory.product(a, b.transpose(1, 2))


def _scores(q: Tensor, k: Tensor, memory: _Memory) -> tuple[Tensor, Tensor | float]:
    """Return ``1 + q k^T`` of a block, float32 or wider, and what its rows were divided by.

    For float16 that is a row's largest magnitude, which keeps the powers within the dtype's range
    and cancels in the quotient.
    """
    r = _product_plus(q, q.new_ones(1, 1, 1, dtype=wide_dtype(q)), k, memory)
    if q.dtype is not torch.float16:
        return r, 1.0
    top = r.abs().amax(-1, keepdim=True).clamp_min_(EPS)
    return r.div_(top), top


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``total += a b``; total may be wider, and of one head where a and b are parts."""
    if total.dtype == a.dtype and len(total) == len(a):
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b).unflatten(0, (len(total), -1)).sum(1, dtype=total.dtype)


@torch.library.custom_op('polynext_mm::poly_attention', mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    row_sum = q.new_empty(q.shape[0], q.shape[1], 1, dtype=wide_dtype(q))
    k, memory = _with_ones(k), _Memory()
    for heads, queries, parts in _blocks(q, k.shape[1]):
        r, _ = _scores(_cut(q[heads, queries], parts), _shared(k[heads], parts), memory)
        a = r.square_().square_()
        total = _cut(row_sum[heads, queries], parts)
        torch.sum(a, -1, keepdim=True, out=total).clamp_min_(EPS)
        product = torch.bmm(a.to(v.dtype), _shared(v[heads], parts))
        torch.div(product, total, out=_cut(out[heads, queries], parts))
    return out, row_sum


@_forward_op.register_fake
def _(q, k, v):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[0], q.shape[1], 1, dtype=wide_dtype(q)),
    )


@torch.library.custom_op('polynext_mm::poly_attention_backward', mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # keys and values gather from every block: their sums are kept wide
    grad_k = torch.zeros_like(k, dtype=wide_dtype(k), memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, dtype=wide_dtype(v), memory_format=torch.contiguous_format)
    k_ones, v_ones = _with_ones(k), _with_ones(v)
    of_scores, of_slope, of_square = _Memory(), _Memory(), _Memory()
    for heads, queries, parts in _blocks(q, k.shape[1]):
        q_b, grad_b, out_b, sum_b = (
            _cut(t[heads, queries], parts) for t in (q, grad, out, row_sum)
        )
        k_ones_b, v_ones_b, k_b = (_shared(t[heads], parts) for t in (k_ones, v_ones, k))
        r, top = _scores(q_b, k_ones_b, of_scores)
        # d out_i / d r_ij = 4 r_ij^3 (v_j - out_i) / sum_i; the factors of a row are applied to
        # what is small.
        share = grad_b / sum_b
        steep = share * (4 / top)
        delta = (steep * out_b).sum(-1, keepdim=True)
        slope = _product_plus(steep.to(v.dtype), -delta, v_ones_b, of_slope)
        square = torch.mul(r, r, out=of_square.of(r.shape, r))
        slope = slope.mul_(r.mul_(square)).to(q.dtype)
        torch.bmm(slope, k_b, out=_cut(grad_q[heads, queries], parts))
        _accumulate(grad_k[heads], slope.transpose(1, 2), q_b)
        _accumulate(grad_v[heads], square.square_().to(v.dtype).transpose(1, 2), share.to(v.dtype))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@_backward_op.register_fake
def _(grad, q, k, v, out, row_sum):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return _backward_op(grad.contiguous(), *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.polynext_mm.poly_attention)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (width + v_shape[-1])


@register_flop_formula(torch.ops.polynext_mm.poly_attention_backward)
def _(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, tokens, width = q_shape
    return 2 * batch * tokens * k_shape[1] * (3 * width + 2 * v_shape[-1])
