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
CPU_BLOCK = 1 << 20
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


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if _is_half(x) else x.dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _blocks(q: Tensor, keys: int, held: int = 1):
    """Slices of queries whose (batch, queries, keys) block of scores, ``held`` times, stays within the
    budget."""
    batch, tokens, _ = q.shape
    budget = (CPU_BLOCK if q.device.type == 'cpu' else DEVICE_BLOCK) // held
    count = math.ceil(tokens * batch * keys / budget)
    size = max(16, math.ceil(tokens / max(1, count)))
    return [slice(i, i + size) for i in range(0, tokens, size)]


def _scores(q: Tensor, k_t: Tensor) -> tuple[Tensor, Tensor | float]:
    """1 + q k^T of a block of queries, float32 or wider. For half types a row is divided by its largest
    magnitude, which the quotient does not feel and which keeps the powers within range; the second value
    is that divisor."""
    r = _wide(torch.bmm(q, k_t)).add_(1)
    if not _is_half(q):
        return r, 1.
    top = r.abs().amax(-1, keepdim=True).clamp_min_(EPS)
    return r.div_(top), top


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


@torch.library.custom_op('polynext_mm::poly_attention', mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    row_sum = q.new_empty(q.shape[0], q.shape[1], 1, dtype=_wide_dtype(q))
    k_t = k.transpose(1, 2)
    for block in _blocks(q, k.shape[1]):
        a = _scores(q[:, block], k_t)[0].square_().square_()
        total = torch.sum(a, -1, keepdim=True).clamp_min_(EPS)
        row_sum[:, block] = total
        torch.div(torch.bmm(a.to(v.dtype), v), total, out=out[:, block])
    return out, row_sum


@_forward_op.register_fake
def _(q, k, v):
    return (torch.empty_like(v, memory_format=torch.contiguous_format),
            q.new_empty(q.shape[0], q.shape[1], 1, dtype=_wide_dtype(q)))


@torch.library.custom_op('polynext_mm::poly_attention_backward', mutates_args=())
def _backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
                 row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # keys and values gather from every block: their sums are kept wide
    grad_k = torch.zeros_like(k, dtype=_wide_dtype(k), memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, dtype=_wide_dtype(v), memory_format=torch.contiguous_format)
    k_t, v_t = k.transpose(1, 2), v.transpose(1, 2)
    for block in _blocks(q, k.shape[1], held=2):
        q_b = q[:, block]
        r, top = _scores(q_b, k_t)
        # d out_i / d r_ij = 4 r_ij^3 (v_j - out_i) / sum_i: the factors of a row go to what is small
        share = grad[:, block] / row_sum[:, block]
        steep = share * (4 / top)
        slope = _wide(torch.bmm(steep.to(v.dtype), v_t))
        slope.sub_((steep * out[:, block]).sum(-1, keepdim=True))
        square = r.square()
        slope = slope.mul_(r.mul_(square)).to(q.dtype)
        grad_q[:, block] = torch.bmm(slope, k)
        _accumulate(grad_k, slope.transpose(1, 2), q_b)
        _accumulate(grad_v, square.square_().to(v.dtype).transpose(1, 2), share.to(v.dtype))
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
