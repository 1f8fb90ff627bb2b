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


def poly_mlp(x: Tensor, w_in: Tensor, w_norm: Tensor | None, w_out: Tensor) -> Tensor:
    """``LN(u * v) w_out^T`` with u, v the two halves of ``x w_in^T`` (paper: PolyMLP).

    Args:
        x (Tensor): (B, H, W, C).
        w_in (Tensor): (2E, C). w_norm (Tensor | None): (E,). w_out (Tensor): (C, E).

    Returns:
        Tensor: (B, H, W, C), in the type of matrix products.
    """
    return _call(_PolyMLP, x, w_in, w_norm, w_out)


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


def depthwise(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Depthwise convolution, stride 1, same padding, of (B, H, W, C) with (C, 1, S, S), S odd."""
    dtype = matmul_dtype(x)
    y = F.conv2d(x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype), None, 1,
                 dilation * (weight.shape[-1] // 2), dilation, weight.shape[0])
    return y.permute(0, 2, 3, 1)


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
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _call(function, x: Tensor, *weights: Tensor | None) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights))
    dtype = matmul_dtype(x)
    if needs_grad:
        return function.apply(dtype, x, *weights)
    return function.compute(dtype, x, *weights)[0]


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


def _depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor,
                        dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`depthwise`.

    The input's is the same convolution with the kernel turned round. For the weight's, a dilated
    convolution is taken apart into its dilation^2 interleaved grids, each an ordinary convolution.
    Both are far faster than the dilated backward of the libraries (12 and 6 times in oneDNN).
    """
    grad_x = depthwise(grad, weight.flip(2, 3).to(grad.dtype), dilation)
    if dilation > 1:
        grad, x = _interleaved_grids(grad, dilation), _interleaved_grids(x, dilation)
    channels, _, size, _ = weight.shape
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight.to(x.dtype), None, [1, 1],
        [size // 2] * 2, [1, 1], False, [0, 0], channels, [False, True, False])
    return grad_x, grad_weight.to(weight.dtype)


def _interleaved_grids(x: Tensor, step: int) -> Tensor:
    """(B, H, W, C) to (step^2 B, H / step, W / step, C), sizes rounded up with zeros."""
    batch, height, width, channels = x.shape
    if height % step or width % step:
        x = F.pad(x, (0, 0, 0, -width % step, 0, -height % step))
        height, width = x.shape[1:3]
    x = x.view(batch, height // step, step, width // step, step, channels)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(-1, height // step, width // step, channels)


class _PolyMLP(torch.autograd.Function):

    @staticmethod
    def compute(dtype, x, w_in, w_norm, w_out):
        halves = F.linear(x.to(dtype), w_in.to(dtype))
        u, v = halves.chunk(2, -1)
        normed, mean, rstd = _norm_forward(u * v, w_norm)
        return F.linear(normed.to(dtype), w_out.to(dtype)), halves, mean, rstd

    @staticmethod
    def forward(ctx, dtype, x, w_in, w_norm, w_out):
        y, *kept = _PolyMLP.compute(dtype, x, w_in, w_norm, w_out)
        ctx.save_for_backward(x, w_in, w_norm, w_out, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, w_norm, w_out, halves, mean, rstd = ctx.saved_tensors
        dtype = halves.dtype
        u, v = halves.chunk(2, -1)
        product = u * v
        normed = _norm_forward(product, w_norm)[0].to(dtype)
        grad, grad_w_out = _linear_backward(grad, normed, w_out)
        grad, grad_w_norm = _norm_backward(grad, product, mean, rstd, w_norm)
        grad = grad.to(dtype)
        grad = torch.cat((grad * v, grad * u), -1)
        grad, grad_w_in = _linear_backward(grad, x, w_in)
        return None, grad.to(x.dtype), grad_w_in, grad_w_norm, grad_w_out


class _PolyConv(torch.autograd.Function):

    @staticmethod
    def compute(dtype, x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        base = F.linear(x.to(dtype), w_in.to(dtype))
        coarse = depthwise(base, w_coarse, dilation=2)
        fine = depthwise(base, w_fine)
        smooth = depthwise(coarse * fine.flip(-1), w_smooth)
        z = F.linear(smooth, w_out.to(dtype))
        y, mean, rstd = _norm_forward(z, w_norm)
        return y, base, coarse, fine, z, mean, rstd

    @staticmethod
    def forward(ctx, dtype, x, *weights):
        y, *kept = _PolyConv.compute(dtype, x, *weights)
        ctx.save_for_backward(x, *weights, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm,
         base, coarse, fine, z, mean, rstd) = ctx.saved_tensors
        grad, grad_w_norm = _norm_backward(grad, z, mean, rstd, w_norm)
        fine = fine.flip(-1)
        product = coarse * fine
        smooth = depthwise(product, w_smooth.to(product.dtype))
        grad, grad_w_out = _linear_backward(grad.to(z.dtype), smooth, w_out)
        grad, grad_w_smooth = _depthwise_backward(grad, product, w_smooth)
        grad_base, grad_w_coarse = _depthwise_backward(grad * fine, base, w_coarse, dilation=2)
        from_fine, grad_w_fine = _depthwise_backward((grad * coarse).flip(-1), base, w_fine)
        grad, grad_w_in = _linear_backward(grad_base + from_fine, x, w_in)
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
