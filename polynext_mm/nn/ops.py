"""The branches of a cell as functions that store little for backward.

Each computes what its docstring says and nothing else. Written with ordinary layers, autograd would
keep every intermediate of these chains; here the products, the flips and the smoothed maps are formed
again in backward, which costs less than moving them through memory. Tensors are (B, H, W, C).

Under autocast, convolutions and matrix products run in its type; norms, the residual stream and all
that is returned from a norm are float32.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LN_EPS = 1e-5

# On a CPU, chains of operations on single positions take blocks of positions that stay in cache:
# elements of the widest map of a block.
CPU_BLOCK = 1 << 19


def poly_mlp(x: Tensor, w_in: Tensor, w_norm: Tensor | None, w_out: Tensor) -> Tensor:
    """``LN(u * v) w_out^T`` with u, v the two halves of ``x w_in^T`` (paper: PolyMLP).

    Args:
        x (Tensor): (B, H, W, C).
        w_in (Tensor): (2E, C). w_norm (Tensor | None): (E,). w_out (Tensor): (C, E).

    Returns:
        Tensor: (B, H, W, C), in the type of matrix products.
    """
    blocks = [_call(_PolyMLP, block, w_in, w_norm, w_out)
              for block in _position_blocks(x, w_in.shape[0])]
    return _from_blocks(blocks, x.shape)


def poly_conv(x: Tensor, w_in: Tensor, w_coarse: Tensor, w_fine: Tensor, w_smooth: Tensor,
              w_out: Tensor, w_norm: Tensor) -> Tensor:
    """``LN(smooth(coarse(b) * flip(fine(b))) w_out^T)`` with ``b = x w_in^T`` (paper: PolyConv).

    ``coarse``, ``fine`` and ``smooth`` are depthwise convolutions, the first with dilation 2; ``flip``
    reverses the channels.

    Args:
        x (Tensor): (B, H, W, C).
        w_in (Tensor): (K, C). w_coarse, w_fine, w_smooth (Tensor): (K, 1, S, S) with S odd.
        w_out (Tensor): (C, K). w_norm (Tensor): (C,).

    Returns:
        Tensor: (B, H, W, C), float32 (float64 for float64 inputs).
    """
    return _call(_PolyConv, x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution, stride 1, same padding, of (B, H, W, C) with (C, 1, S, S), S odd."""
    return _call(_Depthwise, x, weight)


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """LN over the last dimension, without bias, in float32 or wider."""
    x, weight = _wide(x), None if weight is None else _wide(weight)
    return F.layer_norm(x, x.shape[-1:], weight, None, LN_EPS)


def clip_gradient(x: Tensor, max_norm: float, scale: Tensor | float = 1.) -> Tensor:
    """The identity, whose gradient is multiplied by ``max_norm / (n + 1e-6)`` where its L2 norm n over
    the whole tensor exceeds ``max_norm``.

    ``scale`` is the factor on the loss (loss scaling, gradient accumulation): the norm that counts is
    that of the unscaled gradient.
    """
    return _ClipGradient.apply(x, max_norm, scale)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type of convolutions and matrix products on ``x``: autocast's, where it is on."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(device):  # meta, for one
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _position_blocks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """(..., C) as blocks of (positions, C) whose maps of ``width`` channels stay in a CPU's cache."""
    positions = x.reshape(-1, x.shape[-1])
    # a compiled graph makes its own loops, and one over blocks would be compiled for every size
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return (positions,)
    return positions.split(max(1, CPU_BLOCK // width))


def _from_blocks(blocks: list[Tensor], shape: torch.Size) -> Tensor:
    positions = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return positions.view(*shape[:-1], -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _call(function, x: Tensor, *weights: Tensor | None) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights))
    dtype = matmul_dtype(x)
    return (function.apply if needs_grad else function.infer)(dtype, x, *weights)


def _channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W), the same memory."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H, W, C), the same memory."""
    return x.permute(0, 2, 3, 1)


def _norm_forward(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight = None if weight is None else _wide(weight)
    return torch.native_layer_norm(_wide(x), x.shape[-1:], weight, None, LN_EPS)


def _norm_backward(grad, x, mean, rstd, weight) -> tuple[Tensor, Tensor | None]:
    wide = None if weight is None else _wide(weight)
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        _wide(grad), _wide(x), x.shape[-1:], mean, rstd, wide, None,
        [True, weight is not None, False])
    return grad_x, None if weight is None else grad_weight.to(weight.dtype)


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x weight^T``: that of x in the type of ``grad``, the other in the weight's."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_weight = rows.t() @ x.to(grad.dtype).reshape(-1, x.shape[-1])
    return grad @ weight.to(grad.dtype), grad_weight.to(weight.dtype)


# Chains of depthwise convolutions are (B, C, H, W) in channels-last memory.


def _conv(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Depthwise, stride 1, same padding, in the type of ``x``."""
    return F.conv2d(x, weight.to(x.dtype), None, 1, dilation * (weight.shape[-1] // 2), dilation,
                    weight.shape[0])


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor,
                   dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_conv`. The input's is the same convolution with the kernel turned round."""
    grad_x = _conv(grad, weight.flip(2, 3), dilation)
    return grad_x, _conv_weight_grad(grad, x, weight, dilation).to(weight.dtype)


def _conv_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Of the weight alone, by 3x3 convolutions without dilation, the only ones that oneDNN is quick at:
    a dilated convolution is dilation^2 of them on interleaved grids, a 5x5 kernel four of them side by
    side. For 72 channels of 128x128, 5x5 with dilation 2, it takes 12 ms by itself.
    """
    if dilation > 1:
        grad, x = _interleaved_grids(grad, dilation), _interleaved_grids(x, dilation)
    size = weight.shape[-1]
    if size == 3:
        return _weight_grad_3x3(grad, x, 1)
    height, width = x.shape[2:]
    x = F.pad(x, [size // 2] * 4)
    grad_weight = grad.new_empty(weight.shape)
    # windows of 3 taps that cover the kernel; the last may overlap the one before it
    starts = [min(start, size - 3) for start in range(0, size, 3)]
    for i in starts:
        for j in starts:
            window = x[..., i:i + height + 2, j:j + width + 2]
            grad_weight[..., i:i + 3, j:j + 3] = _weight_grad_3x3(grad, window, 0)
    return grad_weight


def _weight_grad_3x3(grad: Tensor, x: Tensor, padding: int) -> Tensor:
    channels = x.shape[1]
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, x.new_empty(channels, 1, 3, 3), None, [1, 1], [padding] * 2, [1, 1], False, [0, 0],
        channels, [False, True, False])
    return grad_weight


def _interleaved_grids(x: Tensor, step: int) -> Tensor:
    """(B, C, H, W) to (step^2 B, C, H / step, W / step), sizes rounded up with zeros."""
    batch, channels, height, width = x.shape
    if height % step or width % step:
        x = F.pad(x, (0, -width % step, 0, -height % step))
        height, width = x.shape[2:]
    x = _channels_last(x).reshape(batch, height // step, step, width // step, step, channels)
    x = x.permute(2, 4, 0, 1, 3, 5).reshape(-1, height // step, width // step, channels)
    return _channels_first(x)


class _Depthwise(torch.autograd.Function):

    @staticmethod
    def infer(dtype, x, weight):
        return _channels_last(_conv(_channels_first(x.to(dtype)), weight))

    @staticmethod
    def forward(ctx, dtype, x, weight):
        ctx.save_for_backward(x, weight)
        return _Depthwise.infer(dtype, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _conv_backward(_channels_first(grad),
                                             _channels_first(x.to(grad.dtype)), weight)
        return None, _channels_last(grad_x).to(x.dtype), grad_weight


class _PolyMLP(torch.autograd.Function):

    @staticmethod
    def infer(dtype, x, w_in, w_norm, w_out):
        return _PolyMLP._compute(dtype, x, w_in, w_norm, w_out)[0]

    @staticmethod
    def _compute(dtype, x, w_in, w_norm, w_out):
        halves = F.linear(x.to(dtype), w_in.to(dtype))
        u, v = halves.chunk(2, -1)
        normed = layer_norm(u * v, w_norm).to(dtype)
        return F.linear(normed, w_out.to(dtype)), halves

    @staticmethod
    def forward(ctx, dtype, x, w_in, w_norm, w_out):
        y, halves = _PolyMLP._compute(dtype, x, w_in, w_norm, w_out)
        ctx.save_for_backward(x, w_in, w_norm, w_out, halves)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, w_norm, w_out, halves = ctx.saved_tensors
        u, v = halves.chunk(2, -1)
        product = u * v
        normed, mean, rstd = _norm_forward(product, w_norm)
        grad, grad_w_out = _linear_backward(grad, normed.to(halves.dtype), w_out)
        grad, grad_w_norm = _norm_backward(grad, product, mean, rstd, w_norm)
        grad = grad.to(halves.dtype)
        grad, grad_w_in = _linear_backward(torch.cat((grad * v, grad * u), -1), x, w_in)
        return None, grad.to(x.dtype), grad_w_in, grad_w_norm, grad_w_out


class _PolyConv(torch.autograd.Function):

    @staticmethod
    def infer(dtype, x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        base = _channels_first(F.linear(x.to(dtype), w_in.to(dtype)))
        product = _conv(base, w_fine).flip(1).mul_(_conv(base, w_coarse, dilation=2))
        smooth = _channels_last(_conv(product, w_smooth))
        blocks = [layer_norm(F.linear(block, w_out.to(dtype)), w_norm)
                  for block in _position_blocks(smooth, max(w_out.shape))]
        return _from_blocks(blocks, x.shape)

    @staticmethod
    def forward(ctx, dtype, x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        base = _channels_first(F.linear(x.to(dtype), w_in.to(dtype)))
        coarse = _conv(base, w_coarse, dilation=2)
        fine = _conv(base, w_fine).flip(1)
        z = F.linear(_channels_last(_conv(coarse * fine, w_smooth)), w_out.to(dtype))
        y, mean, rstd = _norm_forward(z, w_norm)
        ctx.save_for_backward(x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm,
                              base, coarse, fine, z, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm,
         base, coarse, fine, z, mean, rstd) = ctx.saved_tensors
        grad, grad_w_norm = _norm_backward(grad, z, mean, rstd, w_norm)
        product = coarse * fine
        smooth = _channels_last(_conv(product, w_smooth))
        grad, grad_w_out = _linear_backward(grad.to(z.dtype), smooth, w_out)
        grad, grad_w_smooth = _conv_backward(_channels_first(grad), product, w_smooth)
        from_fine, grad_w_fine = _conv_backward((grad * coarse).flip(1), base, w_fine)
        grad, grad_w_coarse = _conv_backward(grad.mul_(fine), base, w_coarse, dilation=2)
        grad, grad_w_in = _linear_backward(_channels_last(grad.add_(from_fine)), x, w_in)
        return (None, grad.to(x.dtype), grad_w_in, grad_w_coarse, grad_w_fine, grad_w_smooth,
                grad_w_out, grad_w_norm)


class _ClipGradient(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, max_norm, scale):
        ctx.max_norm, ctx.scale = max_norm, scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        norm = torch.linalg.vector_norm(grad, dtype=_wide(grad).dtype) / ctx.scale
        factor = torch.where(norm > ctx.max_norm, ctx.max_norm / (norm + 1e-6), 1.)
        return grad * factor.to(grad.dtype), None, None
