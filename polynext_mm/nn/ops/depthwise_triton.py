"""Dilated depthwise convolution as Triton kernels, for CUDA and ROCm devices.

cuDNN's kernels for dilated convolutions in channels-last memory are slow: for 5x5 kernels on 8 maps
of 64x64x144 in bfloat16, a convolution took an H200 259 us and the gradient of its weights 338;
these take 26 and 52 (docs/performance.md).

A map (B, H, W, C) is treated as B H rows of W C places: a tap of the kernel lies dx C places and dy
rows away, and outside the map if the place is outside the row. So no lanes are wasted if the number
of channels is not a power of two. The gradient of the weights is summed here over chunks of
positions, and then elsewhere over the chunks of many weights at once: no two programs write to the
same place. Weights whose taps come first in memory (:mod:`~polynext_mm.nn.ops.ready`) are read
as they are, others are laid out by one more launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import triton_operators
from .precision import Like

SIZES = (3, 5)  # of the kernels, which are unrolled

WARPS = 4
# Of the convolution: rows and places of a program. Each thread has eight places in every row.
TILE = 2, 1024
# Of the weights' gradient: positions and channels of a step, and positions of a program
STEP = 64, 32
MIN_CHUNK, MAX_CHUNKS = 512, 64


def supports(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Return whether the kernels support a convolution, and are the better choice."""
    size = weight.shape[-1]
    return (
        _supports(weight, dilation)
        and x.numel() > 0
        and weight.shape == (x.shape[-1], 1, size, size)
        and triton_operators.takes(x)
    )


def _supports(weight: Tensor, dilation: int) -> bool:
    return dilation > 1 and weight.shape[-1] in SIZES and weight.dtype in triton_operators.DTYPES


def parts(x: 'Tensor | Like', weight: Tensor, dilation: int) -> int:
    """Return how many chunks of (B, H, W, ...) the gradient of a weight is summed over.

    0 if the kernels do not support such a map or weight.
    """
    if not (_supports(weight, dilation) and triton_operators.takes_like(x)):
        return 0
    return _chunks(x)[0]


def _chunks(x: 'Tensor | Like') -> tuple[int, int]:
    """Return the number of chunks, and the positions of each."""
    n_positions = x.shape[:3].numel()
    chunk = max(MIN_CHUNK, triton.cdiv(n_positions, MAX_CHUNKS))
    return triton.cdiv(n_positions, chunk), chunk


@triton.jit(do_not_specialize=['n_rows', 'height', 'width'])
def _convolve_kernel(
    x_ptr,
    weight_ptr,
    plus_ptr,
    y_ptr,
    n_rows,
    height,
    width,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    # a grid has 2^31 programs along its first axis and 2^16 along the others
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channels = places % CHANNELS
    # neighbouring places are neighbouring channels, except at the ends of a position
    VECTOR: tl.constexpr = 8 if CHANNELS % 8 == 0 else 4 if CHANNELS % 4 == 0 else 1
    channels = tl.max_contiguous(tl.multiple_of(channels, VECTOR), VECTOR)
    row_size = width * CHANNELS
    y = rows % height
    starts = rows.to(tl.int64) * row_size
    inside = (rows < n_rows)[:, None] & (places < row_size)[None, :]
    here = starts[:, None] + places[None, :]
    total = tl.zeros([ROWS, PLACES], tl.float32)
    for dy in tl.range(0, SIZE):  # not unrolled: that would need more registers than there are
        down = (dy - SIZE // 2) * DILATION
        rows_inside = (rows < n_rows) & (y + down >= 0) & (y + down < height)
        for dx in tl.static_range(SIZE):
            right = (dx - SIZE // 2) * DILATION * CHANNELS
            places_inside = (places + right >= 0) & (places + right < row_size)
            tap = x_ptr + (here + (down * row_size + right))
            x = tl.load(tap, mask=rows_inside[:, None] & places_inside[None, :], other=0.0)
            of_tap = SIZE * SIZE - 1 - (dy * SIZE + dx) if ROTATED else dy * SIZE + dx
            weight = tl.load(weight_ptr + of_tap * CHANNELS + channels)
            total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    if plus_ptr is not None:
        total += tl.load(plus_ptr + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + here, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['n_positions', 'height', 'width', 'chunk'])
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    part_ptr,
    n_positions,
    height,
    width,
    chunk,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the gradient of one row of taps over a chunk of positions."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_channel = (channels < CHANNELS)[None, :]
    first = tl.program_id(1) * chunk
    dy = tl.program_id(2)
    down = (dy - SIZE // 2) * DILATION
    sum0 = tl.zeros([POSITIONS, BLOCK], tl.float32)
    sum1 = tl.zeros([POSITIONS, BLOCK], tl.float32)
    sum2 = tl.zeros([POSITIONS, BLOCK], tl.float32)
    sum3 = tl.zeros([POSITIONS, BLOCK], tl.float32)
    sum4 = tl.zeros([POSITIONS, BLOCK], tl.float32)
    for start in tl.range(first, tl.minimum(first + chunk, n_positions), POSITIONS):
        positions = start + tl.arange(0, POSITIONS)
        column = positions % width
        row = (positions // width) % height + down
        valid = (positions < tl.minimum(first + chunk, n_positions)) & (row >= 0) & (row < height)
        here = positions.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
        grad = tl.load(grad_ptr + here, mask=valid[:, None] & has_channel, other=0.0)
        grad = grad.to(tl.float32)
        for dx in tl.static_range(SIZE):
            right = (dx - SIZE // 2) * DILATION
            seen = valid & (column + right >= 0) & (column + right < width)
            tap = x_ptr + here + (down * width + right) * CHANNELS
            x = tl.load(tap, mask=seen[:, None] & has_channel, other=0.0).to(tl.float32)
            if dx == 0:
                sum0 += grad * x
            if dx == 1:
                sum1 += grad * x
            if dx == 2:
                sum2 += grad * x
            if dx == 3:
                sum3 += grad * x
            if dx == 4:
                sum4 += grad * x
    place = (tl.program_id(1) * CHANNELS + channels) * (SIZE * SIZE) + dy * SIZE
    valid = channels < CHANNELS
    tl.store(part_ptr + place, tl.sum(sum0, 0), mask=valid)
    tl.store(part_ptr + place + 1, tl.sum(sum1, 0), mask=valid)
    tl.store(part_ptr + place + 2, tl.sum(sum2, 0), mask=valid)
    if SIZE > 3:
        tl.store(part_ptr + place + 3, tl.sum(sum3, 0), mask=valid)
        tl.store(part_ptr + place + 4, tl.sum(sum4, 0), mask=valid)


#: By their names in benchmarks/compile_kernels.py.
KERNELS = {'convolve': _convolve_kernel, 'weight_grad': _weight_grad_kernel}


def _like_x(x, *_):
    return torch.empty_like(x)


@triton_operators.operator(
    'convolve_triton(Tensor x, Tensor weight, int dilation, bool rotated, Tensor? plus) -> Tensor',
    _like_x,
)
def convolve(
    x: Tensor, weight: Tensor, dilation: int, rotated: bool, plus: Tensor | None
) -> Tensor:
    """Convolve (B, H, W, C), stride 1, same padding.

    Args:
        x: (B, H, W, C), contiguous.
        weight: (C, 1, S, S) with S in SIZES.
        dilation: Of the kernels.
        rotated: Rotate the kernels by half a turn, for the gradient of the input.
        plus: A contiguous map that is added to the result, or None.

    Returns:
        A contiguous map in the dtype of ``x``.
    """
    batch, height, width, channels = x.shape
    y = torch.empty_like(x)
    rows, places = TILE
    taps = weight.reshape(channels, -1).t().contiguous()
    grid = triton.cdiv(batch * height, rows), triton.cdiv(width * channels, places)
    with torch.cuda.device_of(x):
        _convolve_kernel[grid](
            *(x, taps, plus, y),
            *(batch * height, height, width),
            CHANNELS=channels,
            SIZE=weight.shape[-1],
            DILATION=dilation,
            ROTATED=rotated,
            ROWS=rows,
            PLACES=places,
            num_warps=WARPS,
        )
    return y


def _sums_like(grad, x, size, dilation):
    return x.new_empty(_chunks(x)[0], x.shape[-1], 1, size, size, dtype=torch.float32)


@triton_operators.operator(
    'depthwise_weight_grad_triton(Tensor grad, Tensor x, int size, int dilation) -> Tensor',
    _sums_like,
)
def weight_grad(grad: Tensor, x: Tensor, size: int, dilation: int) -> Tensor:
    """Return the gradient of the weights over every chunk, (chunks, C, 1, S, S) in float32.

    Args:
        grad: Of the result, (B, H, W, C), contiguous.
        x: The input, of the same kind.
        size: S, in SIZES.
        dilation: Of the kernels.
    """
    batch, height, width, channels = x.shape
    n_positions = batch * height * width
    positions, block = STEP
    count, chunk = _chunks(x)
    parts = _sums_like(grad, x, size, dilation)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[(triton.cdiv(channels, block), count, size)](
            *(grad, x, parts),
            *(n_positions, height, width, chunk),
            CHANNELS=channels,
            SIZE=size,
            DILATION=dilation,
            POSITIONS=positions,
            BLOCK=block,
            num_warps=WARPS,
        )
    return parts


@register_flop_formula(torch.ops.polynext_mm.convolve_triton)
def _(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[-2:].numel()


@register_flop_formula(torch.ops.polynext_mm.depthwise_weight_grad_triton)
def _(grad_shape, x_shape, size, *args, **kwargs) -> int:
    return 2 * grad_shape.numel() * size**2
