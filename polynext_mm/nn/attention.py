"""Polynomial attention, exact and with memory linear in the number of tokens.

For every query i (paper, section on PolyAttn)::

    a_ij  = (1 + q_i . k_j) ** 4
    out_i = sum_j a_ij v_j / sum_j a_ij

The quotient needs no normalized matrix, so blocks of queries are formed, used and forgotten. Forward
keeps q, k, v, the output and one row sum a query; backward forms the blocks again. Both directions are
operators of ``torch.library``: a Python loop over blocks inside a compiled graph would recompile for
every size, and an operator without formulas would count as no operations.
"""
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

EPS = 1e-12  # the smallest divisor, as in the authors' release

# Elements of the block of scores held at a time. On a CPU the block should stay in the last private
# cache; on a GPU it should be large enough to fill the device.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 26


def polynomial_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the weights ``(1 + q k^T) ** 4``, normalized over the keys.

    Args:
        q (Tensor): Queries, already multiplied by the scale, (..., tokens, head width).
        k (Tensor): Keys, (..., tokens, head width).
        v (Tensor): Values, (..., tokens, value width).

    Returns:
        Tensor: (..., tokens, value width) in the type of ``v``. float16 and bfloat16 inputs are
        multiplied in their own type; the power, the sums and the division are float32.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return polynomial_attention_plain(q, k, v)
    lead = q.shape[:-2]
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)]
    out, _ = _forward_op(*flat)
    return out.reshape(*lead, *out.shape[-2:])


def polynomial_attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, with the whole (tokens x tokens) matrix: for export, and to test against."""
    a = _wide(q @ k.transpose(-2, -1)).add(1)
    if _is_half(q):
        a = a / a.abs().amax(-1, keepdim=True).clamp_min(EPS)
    a = a.square().square()
    out = _wide(a.to(v.dtype) @ v) / a.sum(-1, keepdim=True).clamp_min(EPS)
    return out.to(v.dtype)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x.float() if _is_half(x) else x


def _blocks(q: Tensor, keys: int):
    """Slices of queries whose (batch, queries, keys) block of scores stays within the budget."""
    batch, tokens, _ = q.shape
    budget = CPU_BLOCK if q.device.type == 'cpu' else DEVICE_BLOCK
    count = math.ceil(tokens * batch * keys / budget)
    size = max(16, math.ceil(tokens / max(1, count)))
    return [slice(i, i + size) for i in range(0, tokens, size)]


def _scores(q: Tensor, k_t: Tensor) -> Tensor:
    """1 + q k^T of a block of queries, float32 or wider, and for half types divided by its largest
    magnitude a row, which the quotient does not feel and which keeps the powers within range."""
    r = _wide(torch.bmm(q, k_t)).add_(1)
    if _is_half(q):
        r /= r.abs().amax(-1, keepdim=True).clamp_min_(EPS)
    return r


@torch.library.custom_op('polynext_mm::poly_attention', mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    row_sum = _wide(q.new_empty(())).new_empty(q.shape[0], q.shape[1], 1)
    k_t = k.transpose(1, 2)
    for block in _blocks(q, k.shape[1]):
        a = _scores(q[:, block], k_t).square_().square_()
        total = torch.sum(a, -1, keepdim=True).clamp_min_(EPS)
        row_sum[:, block] = total
        out[:, block] = _wide(torch.bmm(a.to(v.dtype), v)) / total
    return out, row_sum


@_forward_op.register_fake
def _(q, k, v):
    sums = torch.float64 if q.dtype is torch.float64 else torch.float32
    return (torch.empty_like(v, memory_format=torch.contiguous_format),
            q.new_empty(q.shape[0], q.shape[1], 1, dtype=sums))


@torch.library.custom_op('polynext_mm::poly_attention_backward', mutates_args=())
def _backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
                 row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # keys and values gather from every block: their sums are kept wide
    grad_k = _wide(k.new_zeros(())).new_zeros(k.shape)
    grad_v = _wide(v.new_zeros(())).new_zeros(v.shape)
    k_t, v_t = k.transpose(1, 2), v.transpose(1, 2)
    for block in _blocks(q, k.shape[1]):
        q_b, grad_b, total = q[:, block], grad[:, block], row_sum[:, block]
        r = _wide(torch.bmm(q_b, k_t)).add_(1)
        if _is_half(q):
            top = r.abs().amax(-1, keepdim=True).clamp_min_(EPS)
            r /= top
            total = total * top  # of the derivative 4 r^3: one power of the row's scale remains
        square = r.square()
        share = (square.square() / row_sum[:, block]).to(v.dtype)
        grad_v += torch.bmm(share.transpose(1, 2), grad_b)
        # d out_i / d a_ij = (v_j - out_i) / sum_i
        inner = (_wide(grad_b) * _wide(out[:, block])).sum(-1, keepdim=True)
        g = _wide(torch.bmm(grad_b, v_t)).sub_(inner)
        g.mul_(square.mul_(r)).mul_(4 / total)
        g = g.to(q.dtype)
        grad_q[:, block] = torch.bmm(g, k)
        grad_k += torch.bmm(g.transpose(1, 2), q_b)
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
