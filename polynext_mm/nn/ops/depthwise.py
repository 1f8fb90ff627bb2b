"""Depthwise convolution of maps (B, H, W, C), stride 1, same padding.

The kernel is torch's convolution with a gradient that is fast on CPUs too; on GPUs, dilated
convolutions are Triton kernels (:mod:`~polynext_mm.nn.ops.depthwise_triton`). As a
``torch.library`` operator it has no strides for a compiler to rearrange. :func:`conv` and
:func:`conv_backward` are its two directions, for kernels with their own backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compat.torch_features import is_compiling
from . import dispatch
from .operators import operator
from .precision import Like, matmul_dtype, wide_dtype
from .ready import grad_of, one

depthwise_triton = dispatch.triton_module('depthwise_triton')

# Positions of the gradient that one convolution uses as its kernel.
CPU_KERNEL = 1 << 11


def depthwise(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Convolve every channel with its own kernel.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, S, S) with S odd.
        dilation: Of the kernels.

    Returns:
        A new map (B, H, W, C) in the dtype of convolutions on ``x``: autocast's, if it is on.
    """
    x = x.to(matmul_dtype(x))
    # With cuDNN, autograd's own backward is better, and an operator would cost time.
    needed = (
        x.device.type == 'cpu'
        or is_compiling()
        or dispatch.by_triton(depthwise_triton, x, weight, dilation)
    )
    return dispatch.run_operator(plain, _forward_op if needed else plain, x, weight, dilation)


def plain(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Compute the same with torch's convolution."""
    return _channels_last(_torchs_forward(_channels_first(x), weight, dilation))


def _channels_first(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """View (B, C, H, W) as (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def copies(x: 'Tensor | Like', weight: Tensor, dilation: int) -> int:
    """Return how many partial sums make up a weight's gradient, for a map (B, H, W, ...).

    Args:
        x: A map with the same number of positions.
        weight: (C, 1, S, S).
        dilation: Of the kernels.

    Returns:
        Their number, or 0 if the gradient is computed as a whole and the weight needs no layout.
    """
    if not dispatch.triton_wanted(depthwise_triton):
        return 0
    return depthwise_triton.parts(x, weight, dilation)


def conv(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Convolve (B, H, W, C), in the dtype of ``x``; the weight may come in copies."""
    weight = one(weight, 4)
    if dispatch.by_triton(depthwise_triton, x, weight, dilation):
        return depthwise_triton.convolve(x, weight, dilation, False, None)
    return plain(x, weight, dilation)


def _torchs_forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    padding = int(dilation * (weight.shape[-1] // 2))  # a tensor when tracing
    y = F.conv2d(x, weight.to(x.dtype), None, 1, padding, dilation, weight.shape[0])
    return y.contiguous(memory_format=torch.channels_last)  # without cuDNN it may be (C, H, W)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, plus: 'Tensor | None' = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, to which ``plus`` is added, and of the weight or its copies."""
    whole, weight = weight, one(weight, 4)
    if dispatch.by_triton(depthwise_triton, x, weight, dilation):
        grad, plus = grad.contiguous(), None if plus is None else plus.contiguous()
        grad_x = depthwise_triton.convolve(grad, weight, dilation, True, plus)
        sums = depthwise_triton.weight_grad(grad, x, weight.shape[-1], dilation)
        return grad_x, grad_of(whole, sums)
    grad, x = _channels_first(grad), _channels_first(x)
    if x.device.type != 'cpu' or not len(x) or (weight.shape[-1] <= 3 and dilation == 1):
        grad_x, grad_weight = _torchs_backward(grad, x, weight, dilation)
    else:
        # The gradient of x is the same convolution with the kernels rotated by half a turn.
        grad_x = _torchs_forward(grad, weight.flip(2, 3), dilation)
        grad_weight = _weight_grad(grad, x, weight, dilation).to(weight.dtype)
    grad_x = _channels_last(grad_x)
    grad_x = grad_x if plus is None else grad_x.add_(plus)
    return grad_x, grad_of(whole, grad_weight[None])


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    # oneDNN is fast only for 3x3 without dilation. A 3x3 convolution with dilation d is d^2 of
    # those on interleaved grids; other sizes take a third less time as a correlation.
    if weight.shape[-1] > 3:
        return _correlation(grad, x, weight, dilation)
    grad, x = _interleaved_grids(grad, dilation), _interleaved_grids(x, dilation)
    return _torchs_backward(grad, x, weight, dilation=1, of_x=False)[1]


def conv_backward_of_x(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of the input, without dilation; x is a map like it."""
    grad, x = _channels_first(grad), _channels_first(x)
    return _channels_last(_torchs_backward(grad, x, weight, dilation=1, of_weight=False)[0])


def conv_backward_of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's gradient of the weight, without dilation."""
    grad, x = _channels_first(grad), _channels_first(x)
    return _torchs_backward(grad, x, weight, dilation=1, of_x=False)[1]


def _torchs_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dilation: int,
    of_x: bool = True,
    of_weight: bool = True,
) -> 'tuple[Any, Any]':
    padding = dilation * (weight.shape[-1] // 2)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight.to(x.dtype),
        None,
        [1, 1],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        weight.shape[0],
        [of_x, of_weight, False],
    )
    return grad_x, grad_weight.to(weight.dtype) if of_weight else None


def _interleaved_grids(x: Tensor, step: int) -> Tensor:
    """Return (step^2 B, C, H / step, W / step) of (B, C, H, W), sizes rounded up with zeros."""
    batch, channels, height, width = x.shape
    if height % step or width % step:
        x = F.pad(x, (0, -width % step, 0, -height % step))
        height, width = x.shape[2:]
    x = _channels_last(x).reshape(batch, height // step, step, width // step, step, channels)
    x = x.permute(2, 4, 0, 1, 3, 5).reshape(-1, height // step, width // step, channels)
    return _channels_first(x)


def _correlation(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Return the gradient of each tap of a kernel, the sum of grad times x shifted by the tap.

    That is a convolution of x with grad as its kernel and the dilation as its stride, computed in
    bands of rows.
    """
    batch, channels, height, width = grad.shape
    margin = dilation * (weight.shape[-1] // 2)
    x = F.pad(x, [margin] * 4)
    rows = max(1, CPU_KERNEL // width)
    total = torch.zeros_like(weight, dtype=wide_dtype(weight))
    for start in range(0, height, rows):
        kernel = grad[:, :, start : start + rows]
        band = x[:, :, start : start + kernel.shape[2] + 2 * margin]
        taps = F.conv2d(
            band.reshape(1, -1, *band.shape[2:]),
            kernel.reshape(-1, 1, *kernel.shape[2:]),
            stride=dilation,
            groups=batch * channels,
        )
        total += taps.view(batch, *weight.shape).sum(0, dtype=total.dtype)
    return total


def _like_forward(x, weight, dilation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_backward(grad, x, weight, dilation):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[-2:].numel()


def _flops_backward(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * x_shape.numel() * weight_shape[-2:].numel()


@operator('depthwise_backward', _like_backward, _flops_backward)
def _backward_op(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = conv_backward(grad, x, weight, dilation)
    return grad_x.contiguous(), grad_weight.contiguous()


def _setup_context(ctx, inputs, output):
    dispatch.remember(ctx)
    x, weight, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


@dispatch.backward
def _backward(ctx, grad):
    return *_backward_op(grad, *ctx.saved_tensors, ctx.dilation), None


@operator('depthwise', _like_forward, _flops, _setup_context, _backward)
def _forward_op(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return conv(x, weight, dilation).contiguous()
