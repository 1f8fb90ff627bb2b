"""Layer norms and what is next to them, fused as Triton kernels, for CUDA and ROCm devices.

A program handles a few whole rows of a map (positions, C), so moments are computed in registers and
every map is read and written once: two to ten times as fast on an H200 as torch's separate kernels
(docs/performance.md). Gradients of weights are sums over all rows: every program of backward
returns the sums over its own rows, which are added up elsewhere, for many weights at once.

Everything between a load and a store is float32. The functions are those of
:mod:`~polynext_mm.nn.ops.norms`, which says what they compute.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_operators
from .precision import LN_EPS, Like

MAX_WIDTH = 2048  # channels of a row in registers
TILE = 2048  # elements of a program, at least a row
MAX_PROGRAMS = 512  # of a backward kernel, each of which writes a row of partial sums
WARPS = 4


def supports(
    width: int,
    maps: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    keep: Tensor | None = None,
) -> bool:
    """Return whether the kernels support these tensors.

    Args:
        width: C, the channels of a norm.
        maps: (..., C) or (..., 2C), as two halves, of the same positions, not all of them None.
        weights: (C,).
        keep: One factor for each of equally many rows.
    """
    first, *others = (m for m in maps if m is not None)
    rows = first.shape[:-1]
    return (
        triton_operators.takes(first, *others, *weights, keep)
        and first.numel() > 0
        and width <= MAX_WIDTH
        and all(
            m.shape[:-1] == rows and m.shape[-1] in (width, 2 * width) for m in (first, *others)
        )
        and all(w is None or w.shape == (width,) for w in weights)
        and (keep is None or rows.numel() % keep.numel() == 0)
    )


@triton.jit
def _places(start, n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows from a start, columns, where there are both, and the places in a map."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    return rows, columns, valid, rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]


@triton.jit
def _normalized(x, valid, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Return rows of zero mean and unit variance, the means and the reciprocal deviations."""
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(valid, x - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + EPS))
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _through_norm(grad, normalized, rstd, WIDTH: tl.constexpr):
    """Return the gradient of what was normalized; invalid places of ``grad`` are zero."""
    mean = tl.sum(grad, 1) / WIDTH
    slope = tl.sum(grad * normalized, 1) / WIDTH
    return rstd[:, None] * (grad - mean[:, None] - normalized * slope[:, None])


@triton.jit
def _store_sum(part_ptr, total, index, columns, WIDTH: tl.constexpr):
    """Store the sum of rows as one of a program's partial sums."""
    tl.store(part_ptr + index * WIDTH + columns, tl.sum(total, 0), mask=columns < WIDTH)


@triton.jit
def _weight(weight_ptr, columns, WIDTH: tl.constexpr):
    if weight_ptr is None:
        return tl.full(columns.shape, 1.0, tl.float32)
    else:
        return tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['n_rows'])
def _product_kernel(
    halves_ptr,
    weight_ptr,
    out_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows, columns, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    half = halves_ptr + place + rows.to(tl.int64)[:, None] * WIDTH
    u = tl.load(half, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(half + WIDTH, mask=valid, other=0.0).to(tl.float32)
    normalized, _, _ = _normalized(u * v, valid, WIDTH, EPS)
    out = normalized * _weight(weight_ptr, columns, WIDTH)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=['n_rows'])
def _product_grad_kernel(
    grad_ptr,
    halves_ptr,
    weight_ptr,
    normed_ptr,
    grad_halves_ptr,
    part_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    weight = _weight(weight_ptr, columns, WIDTH)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows, _, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        half = place + rows.to(tl.int64)[:, None] * WIDTH
        u = tl.load(halves_ptr + half, mask=valid, other=0.0).to(tl.float32)
        v = tl.load(halves_ptr + half + WIDTH, mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
        normalized, _, rstd = _normalized(u * v, valid, WIDTH, EPS)
        normed = normalized * weight
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=valid)
        of_weight += grad * normalized
        grad = _through_norm(grad * weight, normalized, rstd, WIDTH)
        grad_half = grad_halves_ptr + half
        dtype = grad_halves_ptr.dtype.element_ty
        tl.store(grad_half, (grad * v).to(dtype), mask=valid)
        tl.store(grad_half + WIDTH, (grad * u).to(dtype), mask=valid)
    _store_sum(part_ptr, of_weight, tl.program_id(0), columns, WIDTH)


@triton.jit(do_not_specialize=['n_rows', 'rows_per_sample'])
def _add_kernel(
    x_ptr,
    z_ptr,
    keep_ptr,
    weight_ptr,
    out_ptr,
    narrow_ptr,
    mean_ptr,
    rstd_ptr,
    rows_per_sample,
    n_rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows, columns, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    z = tl.load(z_ptr + place, mask=valid, other=0.0).to(tl.float32)
    normalized, mean, rstd = _normalized(z, valid, WIDTH, EPS)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    branch = normalized * _weight(weight_ptr, columns, WIDTH)[None, :]
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + rows // rows_per_sample, mask=rows < n_rows, other=0.0)
        branch = branch * keep.to(tl.float32)[:, None]
    if x_ptr is not None:
        branch += tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, branch.to(out_ptr.dtype.element_ty), mask=valid)
    if narrow_ptr is not None:
        tl.store(narrow_ptr + place, branch.to(narrow_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=['n_rows', 'rows_per_sample'])
def _add_grad_kernel(
    grad_ptr,
    z_ptr,
    keep_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    plus_ptr,
    grad_z_ptr,
    part_ptr,
    rows_per_sample,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    weight = _weight(weight_ptr, columns, WIDTH)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows, _, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        z = tl.load(z_ptr + place, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normalized = (z - mean[:, None]) * rstd[:, None]  # where invalid, its gradient is zero
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + rows // rows_per_sample, mask=rows < n_rows, other=0.0)
            grad = grad * keep.to(tl.float32)[:, None]
        of_weight += grad * normalized
        grad = _through_norm(grad * weight, normalized, rstd, WIDTH)
        if plus_ptr is not None:
            grad += tl.load(plus_ptr + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_z_ptr + place, grad.to(grad_z_ptr.dtype.element_ty), mask=valid)
    _store_sum(part_ptr, of_weight, tl.program_id(0), columns, WIDTH)


@triton.jit(do_not_specialize=['n_rows'])
def _sum_kernel(
    s0_ptr,
    s1_ptr,
    a0_ptr,
    a1_ptr,
    weight_ptr,
    out_ptr,
    narrow_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows, columns, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    a0 = _weight(a0_ptr, columns, WIDTH)[None, :]
    a1 = _weight(a1_ptr, columns, WIDTH)[None, :]
    total = a0 * tl.load(s0_ptr + place, mask=valid, other=0.0).to(tl.float32)
    total += a1 * tl.load(s1_ptr + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(total_ptr + place, total.to(total_ptr.dtype.element_ty), mask=valid)
    normalized, mean, rstd = _normalized(total, valid, WIDTH, EPS)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    out = normalized * _weight(weight_ptr, columns, WIDTH)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=valid)
    if narrow_ptr is not None:
        tl.store(narrow_ptr + place, out.to(narrow_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=['n_rows'])
def _sum_grad_kernel(
    grad_ptr,
    total_ptr,
    s0_ptr,
    s1_ptr,
    a0_ptr,
    a1_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_s0_ptr,
    grad_s1_ptr,
    part_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    a0 = _weight(a0_ptr, columns, WIDTH)[None, :]
    a1 = _weight(a1_ptr, columns, WIDTH)[None, :]
    weight = _weight(weight_ptr, columns, WIDTH)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_a0 = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_a1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows, _, valid, place = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        total = tl.load(total_ptr + place, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normalized = (total - mean[:, None]) * rstd[:, None]  # where invalid, its gradient is zero
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
        of_weight += grad * normalized
        grad = _through_norm(grad * weight, normalized, rstd, WIDTH)
        of_a0 += grad * tl.load(s0_ptr + place, mask=valid, other=0.0).to(tl.float32)
        of_a1 += grad * tl.load(s1_ptr + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_s0_ptr + place, (grad * a0).to(grad_s0_ptr.dtype.element_ty), mask=valid)
        tl.store(grad_s1_ptr + place, (grad * a1).to(grad_s1_ptr.dtype.element_ty), mask=valid)
    first = 3 * tl.program_id(0)
    _store_sum(part_ptr, of_a0, first, columns, WIDTH)
    _store_sum(part_ptr, of_a1, first + 1, columns, WIDTH)
    _store_sum(part_ptr, of_weight, first + 2, columns, WIDTH)


#: The two directions of every function.
KERNELS = {
    'product': (_product_kernel, _product_grad_kernel),
    'add': (_add_kernel, _add_grad_kernel),
    'sum': (_sum_kernel, _sum_grad_kernel),
}


def tile(width: int) -> dict[str, int]:
    """Return the constants that a kernel is compiled with for a number of channels."""
    columns = triton.next_power_of_2(width)
    return dict(WIDTH=width, ROWS=max(1, TILE // columns), COLUMNS=columns, num_warps=WARPS)


def _launch(kernel, programs: int, x: Tensor, *args, **constants) -> None:
    """Run a kernel on the rows of (..., C)."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, x.shape[:-1].numel(), **constants, **tile(x.shape[-1]))


def _rows_per_sample(x: Tensor, keep: Tensor | None) -> int:
    return x.shape[:-1].numel() // (1 if keep is None else keep.numel())


def _programs(x: Tensor) -> int:
    return triton.cdiv(x.shape[:-1].numel(), tile(x.shape[-1])['ROWS'])


def programs(x: 'Tensor | Like', width: int) -> int:
    """Return how many programs a backward kernel runs on the rows of (..., C), for a norm's width.

    0 if the kernels do not support such a map.
    """
    if width > MAX_WIDTH or not triton_operators.takes_like(x):
        return 0
    return min(triton.cdiv(x.shape[:-1].numel(), tile(width)['ROWS']), MAX_PROGRAMS)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the means and reciprocal deviations of the rows of (..., C)."""
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _parts(x: Tensor, *sums: int) -> Tensor:
    """Return room for every program's sums over its rows of (..., C)."""
    return x.new_empty(programs(x, x.shape[-1]), *sums, x.shape[-1], dtype=torch.float32)


def _product_output(halves, weight):
    return halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2)


@triton_operators.operator(
    'norm_of_product_triton(Tensor halves, Tensor? weight) -> Tensor', _product_output
)
def norm_of_product(halves, weight):
    out = _product_output(halves, weight)
    _launch(_product_kernel, _programs(out), out, halves, weight, out, EPS=LN_EPS)
    return out


def _product_grads(grad, halves, weight):
    return torch.empty_like(grad), torch.empty_like(halves), _parts(grad)


@triton_operators.operator(
    'norm_of_product_backward_triton(Tensor grad, Tensor halves, Tensor? weight)'
    ' -> (Tensor, Tensor, Tensor)',
    _product_grads,
)
def norm_of_product_backward(grad, halves, weight):
    normed, grad_halves, parts = _product_grads(grad, halves, weight)
    args = grad, halves, weight, normed, grad_halves, parts
    _launch(_product_grad_kernel, len(parts), grad, *args, EPS=LN_EPS)
    return normed, grad_halves, parts


def _moments_of_z(x, z, keep, weight, out, narrow):
    return _moments(z)


@triton_operators.operator(
    'add_norm_triton(Tensor? x, Tensor z, Tensor? keep, Tensor? weight, Tensor(a!) out,'
    ' Tensor(b!)? narrow) -> (Tensor, Tensor)',
    _moments_of_z,
)
def add_norm(x, z, keep, weight, out, narrow):
    mean, rstd = _moments(z)
    args = x, z, keep, weight, out, narrow, mean, rstd, _rows_per_sample(z, keep)
    _launch(_add_kernel, _programs(z), z, *args, EPS=LN_EPS)
    torch.autograd.graph.increment_version(out)
    if narrow is not None:
        torch.autograd.graph.increment_version(narrow)
    return mean, rstd


def _branch_grads(grad, keep, z, mean, rstd, weight, plus):
    return torch.empty_like(z), _parts(z)


@triton_operators.operator(
    'add_norm_backward_triton(Tensor grad, Tensor? keep, Tensor z, Tensor mean, Tensor rstd,'
    ' Tensor? weight, Tensor? plus) -> (Tensor, Tensor)',
    _branch_grads,
)
def add_norm_backward(grad, keep, z, mean, rstd, weight, plus):
    grad_z, parts = _branch_grads(grad, keep, z, mean, rstd, weight, plus)
    args = grad, z, keep, weight, mean, rstd, plus, grad_z, parts, _rows_per_sample(z, keep)
    _launch(_add_grad_kernel, len(parts), z, *args)
    return grad_z, parts


def _sum_outputs(s0, s1, a0, a1, weight, narrow):
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (s0, s1, a0, a1)))
    total = torch.empty_like(s0, dtype=dtype)
    return torch.empty_like(total), total, *_moments(total)


@triton_operators.operator(
    'norm_of_sum_triton(Tensor s0, Tensor s1, Tensor a0, Tensor a1, Tensor weight,'
    ' Tensor(a!)? narrow) -> (Tensor, Tensor, Tensor, Tensor)',
    _sum_outputs,
)
def norm_of_sum(s0, s1, a0, a1, weight, narrow):
    out, *others = outputs = _sum_outputs(s0, s1, a0, a1, weight, narrow)
    args = s0, s1, a0, a1, weight, out, narrow, *others
    _launch(_sum_kernel, _programs(s0), s0, *args, EPS=LN_EPS)
    if narrow is not None:
        torch.autograd.graph.increment_version(narrow)
    return outputs


def _sums_of_three(grad, *_):
    return _parts(grad, 3)


@triton_operators.operator(
    'norm_of_sum_backward_triton(Tensor grad, Tensor total, Tensor mean, Tensor rstd, Tensor s0,'
    ' Tensor s1, Tensor a0, Tensor a1, Tensor weight, Tensor(a!) grad_s0, Tensor(b!) grad_s1)'
    ' -> Tensor',
    _sums_of_three,
)
def norm_of_sum_backward(grad, total, mean, rstd, s0, s1, a0, a1, weight, grad_s0, grad_s1):
    """Return the sums for a0, a1 and the weight, (programs, 3, C)."""
    parts = _parts(s0, 3)
    args = grad, total, s0, s1, a0, a1, weight, mean, rstd, grad_s0, grad_s1, parts
    _launch(_sum_grad_kernel, len(parts), s0, *args)
    return parts
