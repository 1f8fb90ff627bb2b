"""The products of partners in PolyConv as Triton kernels, for CUDA and ROCm devices.

Torch's operations handle the halves of the channels separately, at a fraction of the device's
memory bandwidth. Maps are (B, H, W, K), contiguous; the partner of a channel is K/2 away
(:func:`~polynext_mm.nn.ops.partner_order`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_operators

PLACES = 1024  # of a program
WARPS = 4


def supports(*maps: Tensor) -> bool:
    """Return whether the kernels support these maps."""
    return triton_operators.takes(*maps) and maps[0].numel() > 0


@triton.jit
def _partners(places, CHANNELS: tl.constexpr):
    """Return the places of the partners: in the other half; a middle channel is its own."""
    HALF: tl.constexpr = CHANNELS // 2
    channels = places % CHANNELS
    partners = places + tl.where(channels < HALF, HALF, tl.where(channels < 2 * HALF, -HALF, 0))
    # as far as neighbours have neighbouring partners
    VECTOR: tl.constexpr = 1 if CHANNELS % 2 else 8 if HALF % 8 == 0 else 4 if HALF % 4 == 0 else 1
    return tl.max_contiguous(tl.multiple_of(partners, VECTOR), VECTOR)


@triton.jit(do_not_specialize=['n_positions'])
def _times_swapped_kernel(
    x_ptr, y_ptr, out_ptr, n_positions, CHANNELS: tl.constexpr, PLACES: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    valid = places < n_positions.to(tl.int64) * CHANNELS
    x = tl.load(x_ptr + places, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + _partners(places, CHANNELS), mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, (x * y).to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=['n_positions'])
def _grads_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    grad_x_ptr,
    grad_y_ptr,
    product_ptr,
    n_positions,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    valid = places < n_positions.to(tl.int64) * CHANNELS
    partners = _partners(places, CHANNELS)
    grad = tl.load(grad_ptr + places, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + partners, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + places, (grad * y).to(grad_x_ptr.dtype.element_ty), mask=valid)
    x = tl.load(x_ptr + places, mask=valid, other=0.0).to(tl.float32)
    tl.store(product_ptr + places, (x * y).to(product_ptr.dtype.element_ty), mask=valid)
    grad = tl.load(grad_ptr + partners, mask=valid, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + partners, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_y_ptr + places, (grad * x).to(grad_y_ptr.dtype.element_ty), mask=valid)


#: By the name in benchmarks/compile_kernels.py.
KERNELS = {'times_swapped': _times_swapped_kernel, 'times_swapped_grads': _grads_kernel}


@triton_operators.operator(
    'times_swapped_triton(Tensor x, Tensor y, Tensor(a!) out) -> ()', lambda x, y, out: None
)
def times_swapped(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Compute ``out = x * swap(y)``; out may be x."""
    with torch.cuda.device_of(x):
        _times_swapped_kernel[(triton.cdiv(x.numel(), PLACES),)](
            *(x, y, out, x.shape[:3].numel()), CHANNELS=x.shape[-1], PLACES=PLACES, num_warps=WARPS
        )
    torch.autograd.graph.increment_version(out)


def _like_x_and_y(grad, x, y):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(x)


@triton_operators.operator(
    'times_swapped_backward_triton(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor, Tensor)',
    _like_x_and_y,
)
def times_swapped_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and y, and ``x * swap(y)`` again.

    They are ``grad * swap(y)`` and ``swap(grad * x)``.
    """
    outputs = _like_x_and_y(grad, x, y)
    with torch.cuda.device_of(x):
        _grads_kernel[(triton.cdiv(x.numel(), PLACES),)](
            *(grad, x, y, *outputs, x.shape[:3].numel()),
            CHANNELS=x.shape[-1],
            PLACES=PLACES,
            num_warps=WARPS,
        )
    return outputs
