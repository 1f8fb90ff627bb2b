"""Polynomial attention as Triton kernels, for CUDA and ROCm devices.

With r_ij = 1 + q_i . k_j and the weights p_ij = r_ij^4 / sum_j r_ij^4, backward is::

    delta_i = dout_i . out_i
    dr_ij   = 4 p_ij / r_ij (dout_i . v_j - delta_i)
    dq_i    = sum_j dr_ij k_j
    dk_j    = sum_i dr_ij q_i
    dv_j    = sum_i p_ij dout_i

The weights are recomputed, tile by tile, from one factor per query that forward keeps besides the
output: c = (sum_j r_ij^4)^(-1/4), with which p = (c r)^4 and 4 p / r = 4 c (c r)^3 stay in the
range of half precision. In float32 it is c^4, since p = c^4 r^4 rounds less often.

Forward is one kernel. Backward is two: dq and delta with a program for each block of queries, then
dk and dv with a program for each block of keys. No two programs write to the same place, so there
are no atomic additions, and no matrix of (queries x keys) reaches memory.

Maps are (B, tokens, heads, width) in this module, with any strides but the last, which is 1: views
of (B, H, W, C) are read in place, and every result is laid out as (B, H, W, C). Products are in the
dtype of the inputs and accumulated in float32; everything else is float32. In float16, each r is
divided by the largest of its row so far, which cancels and keeps r^4 within range.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import triton_operators

WIDTHS = (16, 32, 64)  # of a head: powers of two, as for tiles, and small enough for registers


class Tile(NamedTuple):
    """What a program works on at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int  # loads in flight


def attend(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute polynomial attention with the kernels.

    Args:
        q: Queries, already multiplied by the scale, (..., tokens, width).
        k: Keys, (..., tokens, width).
        v: Values, (..., tokens, width).
        eps: The smallest divisor.

    Returns:
        (..., tokens, width), in memory (..., tokens, heads, width) with heads the last of the
        leading dimensions, and the factors that :func:`attend_backward` needs.

    Raises:
        ValueError: If the shapes do not match.
    """
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        shapes = ', '.join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(
            f'q, k and v have shapes {shapes}: all leading dimensions must be the same, the tokens '
            'of k and v, and the width of q and k'
        )
    out, factor = _forward_op(*map(_map, (q, k, v)), eps)
    return _like(out, v, q), factor


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, laid out as the result of :func:`attend`."""
    grads = _backward_op(*map(_map, (grad, q, k, v, out)), factor)
    grad_q, grad_k, grad_v = (_like(g, t, t) for g, t in zip(grads, (q, k, v)))
    return grad_q, grad_k, grad_v


def _map(t: Tensor) -> Tensor:
    """View (..., heads, tokens, width) as (B, tokens, heads, width)."""
    heads = t.shape[-3] if t.ndim > 2 else 1
    return t.reshape(-1, heads, *t.shape[-2:]).transpose(1, 2)


def _like(t: Tensor, width_of: Tensor, tokens_of: Tensor) -> Tensor:
    """View (B, tokens, heads, width) as (..., heads, tokens, width) again."""
    return t.transpose(1, 2).reshape(*tokens_of.shape[:-1], width_of.shape[-1])


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels support these inputs on their device."""
    return (
        q.dtype in triton_operators.DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] in WIDTHS
        and q.shape[-1] == v.shape[-1]
        and triton_operators.runs_on(q.device)
    )


# Kernels. Token counts change from image to image, so no variants are compiled for them.

RUNTIME_ONLY = ['n_queries', 'n_keys', 'n_heads', 'work']


@triton.jit
def _place(n_blocks, n_heads):
    """Return the block, the image and the head of this program; its neighbors share the head."""
    program = tl.program_id(0)
    map_index = program // n_blocks
    return (
        program % n_blocks,
        (map_index // n_heads).to(tl.int64),
        (map_index % n_heads).to(tl.int64),
    )


@triton.jit
def _load(base, rows, stride, n_rows, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of a head; with MASKED, those past the last are zeros."""
    tile = base + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(tile, mask=rows[:, None] < n_rows, other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def _store(ptr, value, batch, head, rows, n_rows, n_heads, WIDTH: tl.constexpr):
    """Store rows of a head into a contiguous map."""
    base = ptr + (batch * n_rows * n_heads + head) * WIDTH
    tile = base + rows[:, None] * (n_heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(tile, value.to(ptr.dtype.element_ty), mask=rows[:, None] < n_rows)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    factor_ptr,
    n_queries,
    n_keys,
    n_heads,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    work,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, batch, head = _place(tl.cdiv(n_queries, BLOCK_Q), n_heads)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h

    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(q_base, queries, q_stride_t, n_queries, WIDTH, True)
    RUNNING_MAX: tl.constexpr = q.dtype == tl.float16
    top = tl.full([BLOCK_Q], EPS if RUNNING_MAX else 1.0, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    whole = n_keys // BLOCK_K * BLOCK_K
    for TAIL in tl.static_range(2):  # blocks full of keys, then what is left
        first, end = (whole, n_keys) if TAIL else (0, whole)
        for start in tl.range(first, end, BLOCK_K, num_stages=1 if TAIL else STAGES):
            keys = start + tl.arange(0, BLOCK_K)
            k = _load(k_base, keys, k_stride_t, n_keys, WIDTH, TAIL)
            v = _load(v_base, keys, v_stride_t, n_keys, WIDTH, TAIL)
            r = tl.dot(q, tl.trans(k), input_precision=PRECISION) + 1.0
            if TAIL:
                r = tl.where(keys[None, :] < n_keys, r, 0.0)
            if RUNNING_MAX:  # r and the sums so far become those of r / top
                new_top = tl.maximum(top, tl.max(tl.abs(r), 1))
                shrink = top / new_top
                shrink = shrink * shrink
                shrink = shrink * shrink
                total = total * shrink
                acc = acc * shrink[:, None]
                r = r * (1.0 / new_top)[:, None]
                top = new_top
            a = r * r
            a = a * a
            total += tl.sum(a, 1)
            acc = tl.dot(a.to(v.dtype), v, acc, input_precision=PRECISION)

    total = tl.maximum(total, EPS)
    factor = tl.div_rn(1.0, total)
    _store(out_ptr, acc * factor[:, None], batch, head, queries, n_queries, n_heads, WIDTH)
    if q.dtype != tl.float32:
        factor = tl.div_rn(1.0, top * tl.sqrt_rn(tl.sqrt_rn(total)))
    row = (batch * n_heads + head) * n_queries + queries
    tl.store(factor_ptr + row, factor, mask=queries < n_queries)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _grad_q_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    factor_ptr,
    grad_q_ptr,
    shift_ptr,
    n_queries,
    n_keys,
    n_heads,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    work,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, batch, head = _place(tl.cdiv(n_queries, BLOCK_Q), n_heads)
    grad_base = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    out_base = out_ptr + (batch * n_queries * n_heads + head) * WIDTH

    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load(q_base, queries, q_stride_t, n_queries, WIDTH, True)
    grad = _load(grad_base, queries, grad_stride_t, n_queries, WIDTH, True)
    out = _load(out_base, queries, n_heads * WIDTH, n_queries, WIDTH, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = (batch * n_heads + head) * n_queries + queries
    factor = tl.load(factor_ptr + row, mask=queries < n_queries, other=0.0)
    tl.store(shift_ptr + row, 4.0 * factor * delta, mask=queries < n_queries)

    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)  # dq but for the factor of its row
    for start in tl.range(0, n_keys, BLOCK_K, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_K)
        k = _load(k_base, keys, k_stride_t, n_keys, WIDTH, True)
        v = _load(v_base, keys, v_stride_t, n_keys, WIDTH, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if q.dtype == tl.float32:
            r = s + 1.0
        else:
            r = s * factor[:, None] + factor[:, None]
        slope = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        slope = slope * (r * r * r)
        if q.dtype == tl.float16:  # past the last key it may be infinite, and k is zero
            slope = tl.where(keys[None, :] < n_keys, slope, 0.0)
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    acc = acc * (4.0 * factor)[:, None]
    _store(grad_q_ptr, acc, batch, head, queries, n_queries, n_heads, WIDTH)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _grad_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    factor_ptr,
    shift_ptr,
    grad_k_ptr,
    grad_v_ptr,
    n_queries,
    n_keys,
    n_heads,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    work,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, batch, head = _place(tl.cdiv(n_keys, BLOCK_K), n_heads)
    grad_base = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    row_base = (batch * n_heads + head) * n_queries

    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _load(k_base, keys, k_stride_t, n_keys, WIDTH, True)
    v = _load(v_base, keys, v_stride_t, n_keys, WIDTH, True)
    grad_k = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    # the tiles are transposed: (keys, queries)
    for start in tl.range(0, n_queries, BLOCK_Q, num_stages=STAGES):
        queries = start + tl.arange(0, BLOCK_Q)
        q = _load(q_base, queries, q_stride_t, n_queries, WIDTH, True)
        grad = _load(grad_base, queries, grad_stride_t, n_queries, WIDTH, True)
        # zeros past the last query, which then adds nothing
        factor = tl.load(factor_ptr + row_base + queries, mask=queries < n_queries, other=0.0)
        shift = tl.load(shift_ptr + row_base + queries, mask=queries < n_queries, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if q.dtype == tl.float32:
            r = s + 1.0
        else:
            r = s * factor[None, :] + factor[None, :]
        square = r * r
        p = square * square
        if q.dtype == tl.float32:
            p = p * factor[None, :]
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        slope = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        slope = slope * (4.0 * factor)[None, :] - shift[None, :]
        slope = slope * (square * r)
        grad_k = tl.dot(slope.to(q.dtype), q, grad_k, input_precision=PRECISION)
    _store(grad_k_ptr, grad_k, batch, head, keys, n_keys, n_heads, WIDTH)
    _store(grad_v_ptr, grad_v, batch, head, keys, n_keys, n_heads, WIDTH)


# Launching. Tiles are those that compile without spills for sm_80 and sm_90
# (benchmarks/compile_kernels.py), for products in half precision, tf32 and float32. The fastest is
# found on the device; the first is used where the choice must be deterministic.

KERNELS = {
    'forward': _forward_kernel,
    'grad_q': _grad_q_kernel,
    'grad_kv': _grad_kv_kernel,
}
TILES = {
    'forward': {
        'half': (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        'tf32': (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        'ieee': (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    },
    'grad_q': {
        'half': (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 4, 3)),
        'tf32': (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        'ieee': (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    },
    'grad_kv': {
        'half': (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 128, 8, 3)),
        'tf32': (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)),
        'ieee': (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    },
}


def tf32_allowed() -> bool:
    """Return whether torch may compute products of float32 matrices in tf32."""
    if torch.version.hip is not None:  # few of its devices have tf32
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # torch 2.9 and later
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


@functools.cache
def _tuned(kernel: str, tiles: tuple[Tile, ...]) -> triton.runtime.KernelInterface:
    """Return a kernel with the fastest of the tiles, measured once for each amount of work."""
    configs = [
        triton.Config(
            dict(BLOCK_Q=tile.queries, BLOCK_K=tile.keys, STAGES=tile.stages), num_warps=tile.warps
        )
        for tile in tiles
    ]
    options = {}
    if 'cache_results' in inspect.signature(triton.autotune).parameters:  # on disk: triton >= 3.4
        options['cache_results'] = True
    return triton.autotune(configs, key=['work', 'WIDTH'], **options)(KERNELS[kernel])


def _launch(kernel: str, block: str, maps: list[Tensor], others: list[Tensor], **constants) -> None:
    """Run a kernel.

    Args:
        kernel: Its name in KERNELS.
        block: The dimension that its programs divide, BLOCK_Q or BLOCK_K.
        maps: Its strided inputs, the last three of them q, k and v.
        others: Its contiguous inputs and outputs.
        constants: Compile-time constants, besides those that follow from the inputs.
    """
    q, k, _ = maps[-3:]
    batch, n_queries, n_heads, width = q.shape
    n_keys = k.shape[1]
    rows = n_queries if block == 'BLOCK_Q' else n_keys
    half = q.dtype.itemsize == 2
    precision = 'tf32' if not half and tf32_allowed() else 'ieee'
    tiles = TILES[kernel]['half' if half else precision]
    if triton_operators.INTERPRETED or torch.are_deterministic_algorithms_enabled():
        tiles = tiles[:1]
    with torch.cuda.device_of(q):
        _tuned(kernel, tiles)[lambda meta: (triton.cdiv(rows, meta[block]) * batch * n_heads,)](
            *maps,
            *others,
            n_queries,
            n_keys,
            n_heads,
            *(stride for t in maps for stride in t.stride()[:3]),
            (batch * n_heads * n_queries * n_keys).bit_length(),
            PRECISION=precision,
            WIDTH=width,
            **constants,
        )


def _readable(t: Tensor) -> Tensor:
    """Return ``t`` with a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _new_map(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.custom_op('polynext_mm::poly_attention_triton', mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, factor = _forward_outputs(q)
    maps = [_readable(t) for t in (q, k, v)]
    _launch('forward', 'BLOCK_Q', maps, [out, factor], EPS=eps)
    return out, factor


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return _new_map(q), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@_forward_op.register_fake
def _(q, k, v, eps):
    return _forward_outputs(q)


@torch.library.custom_op('polynext_mm::poly_attention_triton_backward', mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_new_map(t) for t in (q, k, v))
    shift = torch.empty_like(factor)
    maps = [_readable(t) for t in (grad, q, k, v)]
    _launch('grad_q', 'BLOCK_Q', maps, [out, factor, grad_q, shift])
    _launch('grad_kv', 'BLOCK_K', maps, [factor, shift, grad_k, grad_v])
    return grad_q, grad_k, grad_v


@_backward_op.register_fake
def _(grad, q, k, v, out, factor):
    return tuple(_new_map(t) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return *_backward_op(grad, *ctx.saved_tensors), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# The products in the equations, without those that a kernel recomputes.


@register_flop_formula(torch.ops.polynext_mm.poly_attention_triton)
def _(q_shape, k_shape, *args, **kwargs) -> int:
    return 2 * 2 * q_shape.numel() * k_shape[1]


@register_flop_formula(torch.ops.polynext_mm.poly_attention_triton_backward)
def _(grad_shape, q_shape, k_shape, *args, **kwargs) -> int:
    return 5 * 2 * q_shape.numel() * k_shape[1]
