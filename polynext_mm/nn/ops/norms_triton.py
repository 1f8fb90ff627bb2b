"""Layer norms and what stands next to them as Triton kernels, for CUDA and ROCm devices.

A program takes a few rows of a map (positions, C) whole, so moments are formed in registers, and
every map is read and written once: five times faster on an H200 than torch's kernels one after the
other, and ten times at few channels (docs/performance.md). Gradients of weights are sums over all
rows: every program of backward keeps those of its rows, and torch adds them up.

Everything between a load and a store is float32. The functions are those of
:mod:`~polynext_mm.nn.ops.norms`, which says what they compute.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_operators
from .precision import LN_EPS

MAX_WIDTH = 2048  # channels of a row in registers
TILE = 2048  # elements of a program, at least a row
MAX_PROGRAMS = 512  # of a backward kernel: each writes a row of partial sums
WARPS = 4


def supports(*maps: Tensor | None) -> bool:
    """Return whether the kernels take these maps (..., C), the first of which has most channels."""
    return triton_operators.takes(*maps) and maps[0].numel() > 0 and maps[0].shape[-1] <= MAX_WIDTH


@triton.jit
def _places(start, n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows from a start, columns, where there are both, and where rows begin."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    return rows, columns, valid, rows.to(tl.int64)[:, None]


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
    rows, columns, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    place = row * WIDTH + columns[None, :]
    half = halves_ptr + row * (2 * WIDTH) + columns[None, :]
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
        rows, _, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        place = row * WIDTH + columns[None, :]
        half = row * (2 * WIDTH) + columns[None, :]
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
    part = part_ptr + tl.program_id(0) * WIDTH + columns
    tl.store(part, tl.sum(of_weight, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=['n_rows', 'rows_per_sample'])
def _add_kernel(
    x_ptr,
    z_ptr,
    keep_ptr,
    weight_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    rows_per_sample,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows, columns, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    place = row * WIDTH + columns[None, :]
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


@triton.jit(do_not_specialize=['n_rows', 'rows_per_sample'])
def _add_grad_kernel(
    grad_ptr,
    z_ptr,
    keep_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_z_ptr,
    part_ptr,
    n_rows,
    rows_per_sample,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    weight = _weight(weight_ptr, columns, WIDTH)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows, _, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        place = row * WIDTH + columns[None, :]
        z = tl.load(z_ptr + place, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normalized = tl.where(valid, (z - mean[:, None]) * rstd[:, None], 0.0)
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + rows // rows_per_sample, mask=rows < n_rows, other=0.0)
            grad = grad * keep.to(tl.float32)[:, None]
        of_weight += grad * normalized
        grad = _through_norm(grad * weight, normalized, rstd, WIDTH)
        tl.store(grad_z_ptr + place, grad.to(grad_z_ptr.dtype.element_ty), mask=valid)
    part = part_ptr + tl.program_id(0) * WIDTH + columns
    tl.store(part, tl.sum(of_weight, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=['n_rows'])
def _sum_kernel(
    s0_ptr,
    s1_ptr,
    a0_ptr,
    a1_ptr,
    weight_ptr,
    out_ptr,
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
    rows, columns, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
    place = row * WIDTH + columns[None, :]
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
        rows, _, valid, row = _places(start, n_rows, WIDTH, ROWS, COLUMNS)
        place = row * WIDTH + columns[None, :]
        total = tl.load(total_ptr + place, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        normalized = tl.where(valid, (total - mean[:, None]) * rstd[:, None], 0.0)
        grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
        of_weight += grad * normalized
        grad = _through_norm(grad * weight, normalized, rstd, WIDTH)
        grad = tl.where(valid, grad, 0.0)
        of_a0 += grad * tl.load(s0_ptr + place, mask=valid, other=0.0).to(tl.float32)
        of_a1 += grad * tl.load(s1_ptr + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_s0_ptr + place, (grad * a0).to(grad_s0_ptr.dtype.element_ty), mask=valid)
        tl.store(grad_s1_ptr + place, (grad * a1).to(grad_s1_ptr.dtype.element_ty), mask=valid)
    part = part_ptr + tl.program_id(0) * (3 * WIDTH) + columns
    tl.store(part, tl.sum(of_a0, 0), mask=columns < WIDTH)
    tl.store(part + WIDTH, tl.sum(of_a1, 0), mask=columns < WIDTH)
    tl.store(part + 2 * WIDTH, tl.sum(of_weight, 0), mask=columns < WIDTH)


#: The two directions of every function.
KERNELS = {
    'product': (_product_kernel, _product_grad_kernel),
    'add': (_add_kernel, _add_grad_kernel),
    'sum': (_sum_kernel, _sum_grad_kernel),
}


def tile(width: int) -> dict[str, int]:
    """Return what a kernel is compiled with for a number of channels."""
    columns = triton.next_power_of_2(width)
    return dict(WIDTH=width, ROWS=max(1, TILE // columns), COLUMNS=columns, num_warps=WARPS)


def _programs(x: Tensor, most: int | None = None) -> int:
    count = triton.cdiv(x.numel() // x.shape[-1], tile(x.shape[-1])['ROWS'])
    return count if most is None else min(count, most)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the means and reciprocal deviations of the rows of (..., C)."""
    return tuple(x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))


def _parts(x: Tensor, *sums: int) -> Tensor:
    """Return room for every program's sums over its rows of (..., C)."""
    return x.new_empty(_programs(x, MAX_PROGRAMS), *sums, x.shape[-1], dtype=torch.float32)


def _summed(parts: Tensor, weight: Tensor | None) -> Tensor:
    return parts.sum(0).to(parts.dtype if weight is None else weight.dtype)


def _half_of(halves: Tensor) -> Tensor:
    return halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2)


def _no_product(halves, weight):
    return _half_of(halves)


@triton_operators.operator(
    'norm_of_product_triton(Tensor halves, Tensor? weight) -> Tensor', _no_product
)
def norm_of_product(halves, weight):
    out = _half_of(halves)
    rows, constants = out.numel() // out.shape[-1], tile(out.shape[-1])
    with torch.cuda.device_of(halves):
        _product_kernel[(_programs(out),)](halves, weight, out, rows, EPS=LN_EPS, **constants)
    return out


def _no_product_grads(grad, halves, weight):
    return torch.empty_like(grad), torch.empty_like(halves), _no_sums(grad, weight)


def _no_sums(grad, weight):
    return grad.new_empty(grad.shape[-1], dtype=torch.float32 if weight is None else weight.dtype)


@triton_operators.operator(
    'norm_of_product_backward_triton(Tensor grad, Tensor halves, Tensor? weight)'
    ' -> (Tensor, Tensor, Tensor)',
    _no_product_grads,
)
def norm_of_product_backward(grad, halves, weight):
    normed, grad_halves, parts = torch.empty_like(grad), torch.empty_like(halves), _parts(grad)
    rows, constants = grad.numel() // grad.shape[-1], tile(grad.shape[-1])
    with torch.cuda.device_of(grad):
        _product_grad_kernel[(len(parts),)](
            *(grad, halves, weight, normed, grad_halves, parts), rows, EPS=LN_EPS, **constants
        )
    return normed, grad_halves, _summed(parts, weight)


def _no_moments(x, z, keep, weight, out):
    return _moments(z)


@triton_operators.operator(
    'add_norm_triton(Tensor? x, Tensor z, Tensor? keep, Tensor? weight, Tensor(a!) out)'
    ' -> (Tensor, Tensor)',
    _no_moments,
)
def add_norm(x, z, keep, weight, out):
    mean, rstd = _moments(z)
    rows, constants = z.numel() // z.shape[-1], tile(z.shape[-1])
    with torch.cuda.device_of(z):
        _add_kernel[(_programs(z),)](
            *(x, z, keep, weight, out, mean, rstd),
            *(rows, rows // (1 if keep is None else keep.numel())),
            EPS=LN_EPS,
            **constants,
        )
    return mean, rstd


def _no_branch_grads(grad, keep, z, mean, rstd, weight):
    return torch.empty_like(z), _no_sums(z, weight)


@triton_operators.operator(
    'add_norm_backward_triton(Tensor grad, Tensor? keep, Tensor z, Tensor mean, Tensor rstd,'
    ' Tensor? weight) -> (Tensor, Tensor)',
    _no_branch_grads,
)
def add_norm_backward(grad, keep, z, mean, rstd, weight):
    grad_z, parts = torch.empty_like(z), _parts(z)
    rows, constants = z.numel() // z.shape[-1], tile(z.shape[-1])
    with torch.cuda.device_of(z):
        _add_grad_kernel[(len(parts),)](
            *(grad, z, keep, weight, mean, rstd, grad_z, parts),
            *(rows, rows // (1 if keep is None else keep.numel())),
            **constants,
        )
    return grad_z, _summed(parts, weight)


def _no_sum(s0, s1, a0, a1, weight):
    total = torch.empty_like(s0, dtype=torch.promote_types(s0.dtype, a0.dtype))
    return torch.empty_like(total), total, *_moments(total)


@triton_operators.operator(
    'norm_of_sum_triton(Tensor s0, Tensor s1, Tensor a0, Tensor a1, Tensor weight)'
    ' -> (Tensor, Tensor, Tensor, Tensor)',
    _no_sum,
)
def norm_of_sum(s0, s1, a0, a1, weight):
    out, total, mean, rstd = outputs = _no_sum(s0, s1, a0, a1, weight)
    rows, constants = s0.numel() // s0.shape[-1], tile(s0.shape[-1])
    with torch.cuda.device_of(s0):
        _sum_kernel[(_programs(s0),)](
            *(s0, s1, a0, a1, weight, out, total, mean, rstd), rows, EPS=LN_EPS, **constants
        )
    return outputs


def _no_sum_grads(grad, total, mean, rstd, s0, s1, a0, a1, weight, grad_s0, grad_s1):
    return tuple(map(torch.empty_like, (a0, a1, weight)))


@triton_operators.operator(
    'norm_of_sum_backward_triton(Tensor grad, Tensor total, Tensor mean, Tensor rstd, Tensor s0,'
    ' Tensor s1, Tensor a0, Tensor a1, Tensor weight, Tensor(a!) grad_s0, Tensor(b!) grad_s1)'
    ' -> (Tensor, Tensor, Tensor)',
    _no_sum_grads,
)
def norm_of_sum_backward(grad, total, mean, rstd, s0, s1, a0, a1, weight, grad_s0, grad_s1):
    parts = _parts(s0, 3)
    rows, constants = s0.numel() // s0.shape[-1], tile(s0.shape[-1])
    with torch.cuda.device_of(s0):
        _sum_grad_kernel[(len(parts),)](
            *(grad, total, s0, s1, a0, a1, weight, mean, rstd, grad_s0, grad_s1, parts),
            rows,
            **constants,
        )
    return tuple(g.to(w.dtype) for g, w in zip(parts.sum(0).unbind(), (a0, a1, weight)))
