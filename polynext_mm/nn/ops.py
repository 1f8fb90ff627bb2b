"""The branches of a cell as functions that store little for backward and stay in a CPU's cache.

Each computes what its docstring says and nothing else. Written with ordinary layers, autograd would
keep every intermediate of these chains; here most are formed again in backward, which costs less than
moving them through memory. A compiler decides that better for its own loops: in its graphs a branch is
the ordinary operations of its docstring. Tensors are (B, H, W, C).

A branch is added to the residual stream x where it is made, times ``keep``, the (B, 1, 1, 1) factors of
drop path, or as it is where that is None. Where nothing needs a gradient, x itself becomes the sum.

Under autocast, convolutions and matrix products run in its type; norms and the residual stream are
float32.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .depthwise import channels_first, channels_last, conv, conv_backward, depthwise
from .precision import matmul_dtype, wide, wide_dtype
from .tracing import compiling

LN_EPS = 1e-5

# On a CPU, chains of operations on single positions take blocks of positions that stay in cache:
# elements of the widest map of a block.
CPU_BLOCK = 1 << 19


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """LN over the last dimension, without bias, in float32 or wider."""
    return F.layer_norm(
        wide(x), x.shape[-1:], None if weight is None else wide(weight), None, LN_EPS
    )


def norm_of_pair(s0: Tensor, s1: Tensor, scale0: Tensor, scale1: Tensor, w_norm: Tensor) -> Tensor:
    """``LN(scale0 * s0 + scale1 * s1)``, with which a cell begins.

    Args:
        s0, s1 (Tensor): (B, H, W, C).
        scale0, scale1, w_norm (Tensor): (C,).

    Returns:
        Tensor: (B, H, W, C), float32 (float64 for float64 inputs).
    """
    if compiling():
        return layer_norm(_sum_of_pair(s0, s1, scale0, scale1), w_norm)
    return _call(_NormOfPair, s0, s1, scale0, scale1, w_norm)


def add_poly_mlp(
    x: Tensor, keep: Tensor | None, w_in: Tensor, w_norm: Tensor | None, w_out: Tensor
) -> Tensor:
    """``x + keep * LN(u * v) w_out^T`` with u, v the two halves of ``x w_in^T`` (paper: PolyMLP).

    Args:
        x (Tensor): (B, H, W, C). keep (Tensor | None): (B, 1, 1, 1).
        w_in (Tensor): (2E, C). w_norm (Tensor | None): (E,). w_out (Tensor): (C, E).

    Returns:
        Tensor: (B, H, W, C), of the type of ``x``.
    """
    if compiling():
        u, v = _linear(x, w_in).chunk(2, -1)
        return x + _scaled(_linear(layer_norm(u * v, w_norm), w_out), keep)
    return _call(_PolyMLP, x, keep, w_in, w_norm, w_out)


def add_poly_conv(
    x: Tensor,
    keep: Tensor | None,
    w_in: Tensor,
    w_coarse: Tensor,
    w_fine: Tensor,
    w_smooth: Tensor,
    w_out: Tensor,
    w_norm: Tensor,
) -> Tensor:
    """``x + keep * LN(smooth(coarse(b) * swap(fine(b))) w_out^T)`` with ``b = x w_in^T`` (paper:
    PolyConv).

    ``coarse``, ``fine`` and ``smooth`` are depthwise convolutions, the first with dilation 2; ``swap``
    exchanges partners, see :func:`partner_order`.

    Args:
        x (Tensor): (B, H, W, C). keep (Tensor | None): (B, 1, 1, 1).
        w_in (Tensor): (K, C). w_coarse, w_fine, w_smooth (Tensor): (K, 1, S, S) with S odd.
        w_out (Tensor): (C, K). w_norm (Tensor): (C,).

    Returns:
        Tensor: (B, H, W, C), of the type of ``x``.
    """
    if compiling():
        base = _linear(x, w_in)
        product = depthwise(base, w_coarse, dilation=2) * _swap(depthwise(base, w_fine))
        return x + _scaled(layer_norm(_linear(depthwise(product, w_smooth), w_out), w_norm), keep)
    return _call(_PolyConv, x, keep, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm)


def partner_order(channels: int) -> Tensor:
    """The paper's inner channels of a PolyConv in the order that they have here.

    The paper multiplies channel i of one map by channel K - 1 - i of the other. Here the second half of
    the channels is held in reverse: partners are K/2 apart, and two halves are multiplied crosswise
    where a map would have to be reversed. If K is odd, the middle one comes last, its own partner.
    """
    half = channels // 2
    order = torch.arange(channels)
    return torch.cat((order[:half], order.flip(0)[:half], order[half : channels - half]))


def add_linear(x: Tensor, keep: Tensor | None, y: Tensor, weight: Tensor) -> Tensor:
    """``x + keep * y weight^T``, of (B, H, W, C), (B, 1, 1, 1) or None, (B, H, W, K) and (C, K)."""
    if compiling() or _need_grad(x, y, weight):
        return x + _scaled(_linear(y, weight), keep)
    dtype = matmul_dtype(y)
    _add_product(
        _rows(x), _rows(y).to(dtype), weight.to(dtype).t(), _keep_rows(keep, x), out=_rows(x)
    )
    return x


def clip_gradient(x: Tensor, max_norm: float, scale: Tensor | float = 1.0) -> Tensor:
    """The identity, whose gradient is multiplied by ``max_norm / (n + 1e-6)`` where its L2 norm n over
    the whole tensor exceeds ``max_norm``.

    ``scale`` is the factor on the loss (loss scaling, gradient accumulation): the norm that counts is
    that of the unscaled gradient.
    """
    return _ClipGradient.apply(x, max_norm, scale)


def _need_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _call(function, *tensors: Tensor | None) -> Tensor:
    return (function.apply if _need_grad(*tensors) else function.infer)(*tensors)


def _blocks(width: int, *maps: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Maps (positions, C) in blocks of positions, for chains of operations on single positions: on a CPU
    a map of ``width`` channels of a block stays in cache."""
    positions = maps[0].shape[0]
    size = max(1, CPU_BLOCK // width)
    if positions <= size or maps[0].device.type != 'cpu':
        yield maps
        return
    for start in range(0, positions, size):
        yield tuple(None if m is None else m[start : start + size] for m in maps)


def _bands(
    width: int, x: Tensor, keep: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, range]]:
    """Samples of a batch, with the rows at which bands of them start, for chains of operations on
    neighbourhoods: on a CPU a map of ``width`` channels of a band stays in cache. A map that is not much
    larger is left whole, since bands overlap."""
    batch, height, columns, _ = x.shape
    if batch * height * columns * width <= 2 * CPU_BLOCK or x.device.type != 'cpu':
        yield x, keep, range(1)
        return
    count = math.ceil(height * columns * width / CPU_BLOCK)
    rows = max(16, math.ceil(height / count))
    for i in range(batch):
        yield x[i : i + 1], None if keep is None else keep[i : i + 1], range(0, height, rows)


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, C) as (positions, C), the same memory."""
    return x.view(-1, x.shape[-1])


def _keep_rows(keep: Tensor | None, x: Tensor) -> Tensor | None:
    """(B, 1, 1, 1) as (positions, 1)."""
    return None if keep is None else keep.expand(*x.shape[:3], 1).reshape(-1, 1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    dtype = matmul_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype))


def _scaled(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


# Of matrix products in place, counters of operations know those with ``out``.


def _add_product(x: Tensor, y: Tensor, matrix: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """out = x + keep * y matrix, where x and out may be wider than y, and may be the same."""
    if keep is None and x.dtype == y.dtype:
        torch.addmm(x, y, matrix, out=out)
    else:
        torch.add(x, _scaled(y @ matrix, keep), out=out)


def _add_outer_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total += grad^T x, where total may be wider."""
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), x, out=total)
    else:
        total.add_(grad.t() @ x)


def _norm_forward(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight = None if weight is None else wide(weight)
    return torch.native_layer_norm(wide(x), x.shape[-1:], weight, None, LN_EPS)


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The gradient of x; that of the weight is added to ``grad_weight``."""
    grad_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        wide(grad),
        wide(x),
        x.shape[-1:],
        mean,
        rstd,
        None if weight is None else wide(weight),
        None,
        [True, weight is not None, False],
    )
    if weight is not None:
        grad_weight += of_weight
    return grad_x


def _zeros_like(*weights: Tensor | None) -> list[Tensor | None]:
    return [None if w is None else torch.zeros_like(w) for w in weights]


def _partners(channels: int) -> list[tuple[slice, slice]]:
    """Slices of channels, each with that of its partners."""
    half = channels // 2
    first, second, middle = slice(half), slice(half, 2 * half), slice(2 * half, channels)
    pairs = [(first, second), (second, first)]
    return pairs if channels % 2 == 0 else pairs + [(middle, middle)]


def _crosswise(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x * swap(y), of (B, C, H, W); ``out`` may be x, and may be left alone."""
    out = torch.empty_like(x) if out is None else out
    for own, partner in _partners(x.shape[1]):
        torch.mul(x[:, own], y[:, partner], out=out[:, own])
    return out


def _swapped_product(x: Tensor, y: Tensor) -> Tensor:
    """swap(x * y), of (B, C, H, W)."""
    out = torch.empty_like(x)
    for own, partner in _partners(x.shape[1]):
        torch.mul(x[:, partner], y[:, partner], out=out[:, own])
    return out


def _swap(x: Tensor) -> Tensor:
    """Partners exchanged, of (B, H, W, C)."""
    half = x.shape[-1] // 2
    swapped = x[..., : 2 * half].unflatten(-1, (2, half)).flip(-2).flatten(-2)
    return swapped if x.shape[-1] == 2 * half else torch.cat((swapped, x[..., 2 * half :]), -1)


def _sum_of_pair(s0: Tensor, s1: Tensor, scale0: Tensor, scale1: Tensor) -> Tensor:
    return torch.addcmul(scale0 * s0, scale1, s1)


class _NormOfPair(torch.autograd.Function):
    @staticmethod
    def infer(s0, s1, scale0, scale1, w_norm):
        blocks = [
            layer_norm(_sum_of_pair(s0_b, s1_b, scale0, scale1), w_norm)
            for s0_b, s1_b in _blocks(s0.shape[-1], _rows(s0), _rows(s1))
        ]
        rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        # not a view: a compiler would tell the first stack of a cell from the others by it
        return torch.ops.aten._unsafe_view(rows, s0.shape)

    @staticmethod
    def forward(ctx, s0, s1, scale0, scale1, w_norm):
        ctx.save_for_backward(s0, s1, scale0, scale1, w_norm)
        return _NormOfPair.infer(s0, s1, scale0, scale1, w_norm)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        s0, s1, *weights = ctx.saved_tensors
        scale0, scale1, w_norm = weights
        grad_s0, grad_s1 = torch.empty_like(s0), torch.empty_like(s1)
        grad_scale0, grad_scale1, grad_w_norm = grad_weights = _zeros_like(*weights)
        for g, s0_b, s1_b, grad_s0_b, grad_s1_b in _blocks(
            s0.shape[-1], *map(_rows, (grad.contiguous(), s0, s1, grad_s0, grad_s1))
        ):
            x = _sum_of_pair(s0_b, s1_b, scale0, scale1)
            _, mean, rstd = _norm_forward(x, w_norm)
            g = _norm_backward(g, x, mean, rstd, w_norm, grad_w_norm)
            torch.mul(g, scale0, out=grad_s0_b)
            torch.mul(g, scale1, out=grad_s1_b)
            grad_scale0 += (g * s0_b).sum(0)
            grad_scale1 += (g * s1_b).sum(0)
        return grad_s0, grad_s1, *grad_weights


class _PolyMLP(torch.autograd.Function):
    @staticmethod
    def infer(x, keep, w_in, w_norm, w_out):
        dtype = matmul_dtype(x)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        for x_b, keep_b in _blocks(w_in.shape[0], _rows(x), _keep_rows(keep, x)):
            u, v = F.linear(x_b.to(dtype), w_in).chunk(2, -1)
            _add_product(x_b, layer_norm(u * v, w_norm).to(dtype), w_out.t(), keep_b, out=x_b)
        return x

    @staticmethod
    def forward(ctx, x, keep, w_in, w_norm, w_out):
        dtype = matmul_dtype(x)
        y = torch.empty_like(x)
        halves = x.new_empty(*x.shape[:3], w_in.shape[0], dtype=dtype)
        ctx.save_for_backward(x, keep, w_in, w_norm, w_out, halves)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        for y_b, x_b, keep_b, halves_b in _blocks(
            w_in.shape[0], _rows(y), _rows(x), _keep_rows(keep, x), _rows(halves)
        ):
            u, v = torch.mm(x_b.to(dtype), w_in.t(), out=halves_b).chunk(2, -1)
            _add_product(x_b, layer_norm(u * v, w_norm).to(dtype), w_out.t(), keep_b, out=y_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, keep, w_in, w_norm, w_out, halves = ctx.saved_tensors
        dtype = halves.dtype
        grad_w_in, grad_w_norm, grad_w_out = grad_weights = _zeros_like(w_in, w_norm, w_out)
        grad = grad.contiguous()
        grad_x = torch.empty_like(grad)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        for g, grad_x_b, x_b, keep_b, halves_b in _blocks(
            w_in.shape[0], _rows(grad), _rows(grad_x), _rows(x), _keep_rows(keep, x), _rows(halves)
        ):
            u, v = halves_b.chunk(2, -1)
            product = u * v
            normed, mean, rstd = _norm_forward(product, w_norm)
            g_out = _scaled(g, keep_b).to(dtype)
            _add_outer_(grad_w_out, g_out, normed.to(dtype))
            g_product = _norm_backward(g_out @ w_out, product, mean, rstd, w_norm, grad_w_norm).to(
                dtype
            )
            g_halves = torch.empty_like(halves_b)
            g_u, g_v = g_halves.chunk(2, -1)
            torch.mul(g_product, v, out=g_u)
            torch.mul(g_product, u, out=g_v)
            _add_outer_(grad_w_in, g_halves, x_b.to(dtype))
            _add_product(g, g_halves, w_in, None, out=grad_x_b)
        return grad_x, None, *grad_weights


class _PolyConv(torch.autograd.Function):
    @staticmethod
    def infer(x, keep, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        dtype = matmul_dtype(x)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        reach = max(w_coarse.shape[-1] - 1, w_fine.shape[-1] // 2) + w_smooth.shape[-1] // 2
        for x_s, keep_s, starts in _bands(w_in.shape[0], x, keep):
            stops = [*starts[1:], x.shape[1]]
            base, known = x_s.new_empty(*x_s.shape[:3], w_in.shape[0], dtype=dtype), 0
            for start, stop in zip(starts, stops):
                # the convolutions of this band look at rows first..last, of which the ones from known on
                # are still unchanged in x
                first, last = max(start - reach, 0), min(stop + reach, x.shape[1])
                torch.mm(
                    _rows(x_s[:, known:last]).to(dtype), w_in.t(), out=_rows(base[:, known:last])
                )
                known = last

                maps = channels_first(base[:, first:last])
                coarse = conv(maps, w_coarse, dilation=2)
                product = _crosswise(coarse, conv(maps, w_fine), out=coarse)
                smooth = channels_last(conv(product, w_smooth))[:, start - first : stop - first]
                branch = layer_norm(F.linear(_rows(smooth), w_out), w_norm)
                band = x_s[:, start:stop]
                _rows(band).add_(_scaled(branch, _keep_rows(keep_s, band)))
        return x

    @staticmethod
    def forward(ctx, x, keep, w_in, w_coarse, w_fine, w_smooth, w_out, w_norm):
        dtype = matmul_dtype(x)
        base = channels_first(F.linear(x.to(dtype), w_in.to(dtype)))
        coarse, fine = conv(base, w_coarse, dilation=2), conv(base, w_fine)
        smooth = channels_last(conv(_crosswise(coarse, fine), w_smooth))
        y, z = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        # means and reciprocal deviations
        moments = z.new_empty(2, z[..., 0].numel(), 1, dtype=wide_dtype(z))
        ctx.save_for_backward(
            x,
            keep,
            w_in,
            w_coarse,
            w_fine,
            w_smooth,
            w_out,
            w_norm,
            base,
            coarse,
            fine,
            smooth,
            z,
            *moments,
        )
        w_out = w_out.to(dtype)
        for y_b, x_b, keep_b, smooth_b, z_b, mean_b, rstd_b in _blocks(
            max(w_out.shape),
            _rows(y),
            _rows(x),
            _keep_rows(keep, x),
            _rows(smooth),
            _rows(z),
            *moments,
        ):
            torch.mm(smooth_b, w_out.t(), out=z_b)
            branch, mean, rstd = _norm_forward(z_b, w_norm)
            mean_b.copy_(mean)
            rstd_b.copy_(rstd)
            torch.add(x_b, _scaled(branch, keep_b), out=y_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (
            x,
            keep,
            w_in,
            w_coarse,
            w_fine,
            w_smooth,
            w_out,
            w_norm,
            base,
            coarse,
            fine,
            smooth,
            z,
            *moments,
        ) = ctx.saved_tensors
        dtype = z.dtype
        grad_w_in, grad_w_out, grad_w_norm = _zeros_like(w_in, w_out, w_norm)
        grad = grad.contiguous()
        g_smooth = torch.empty_like(smooth)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        for g, keep_b, z_b, smooth_b, g_smooth_b, mean, rstd in _blocks(
            max(w_out.shape),
            _rows(grad),
            _keep_rows(keep, x),
            _rows(z),
            _rows(smooth),
            _rows(g_smooth),
            *moments,
        ):
            g = _norm_backward(_scaled(g, keep_b), z_b, mean, rstd, w_norm, grad_w_norm).to(dtype)
            _add_outer_(grad_w_out, g, smooth_b)
            torch.mm(g, w_out, out=g_smooth_b)
        g, grad_w_smooth = conv_backward(
            channels_first(g_smooth), _crosswise(coarse, fine), w_smooth
        )
        from_fine, grad_w_fine = conv_backward(_swapped_product(g, coarse), base, w_fine)
        g, grad_w_coarse = conv_backward(_crosswise(g, fine, out=g), base, w_coarse, dilation=2)
        g = _rows(channels_last(g.add_(from_fine)))
        _add_outer_(grad_w_in, g, _rows(x).to(dtype))
        grad_x = torch.empty_like(grad)
        _add_product(_rows(grad), g, w_in, None, out=_rows(grad_x))
        return (
            grad_x,
            None,
            grad_w_in,
            grad_w_coarse,
            grad_w_fine,
            grad_w_smooth,
            grad_w_out,
            grad_w_norm,
        )


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, max_norm, scale):
        ctx.max_norm, ctx.scale = max_norm, scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        norm = torch.linalg.vector_norm(grad, dtype=wide_dtype(grad)) / ctx.scale
        factor = torch.where(norm > ctx.max_norm, ctx.max_norm / (norm + 1e-6), 1.0)
        return grad * factor.to(grad.dtype), None, None
