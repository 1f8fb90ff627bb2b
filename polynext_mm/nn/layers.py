"""The layers of a cell. Maps are (B, H, W, C) in memory and in shape.

The three branches, :class:`PolyMLP`, :class:`PolyConv` and :class:`PolyAttn`, are called with the
residual stream x and return ``x + keep * gate * F(x)``, F being what the paper gives the branch's
name to:

- ``gate``, a scalar, is the branch's sigmoid(lam), or None for 1. It is folded into the smallest
  weight at the end of the branch, so that it scales neither a map nor a matrix.
- ``keep``, (B, 1, 1, 1), is the factor of drop path, or None for 1.

The layers inside a branch hold its weights; the branch passes these to an operation of
:mod:`polynext_mm.nn.ops` and does not call all of the layers. Hooks belong on the branch.
"""

import math

import torch
from torch import Tensor, nn

from . import ops
from .ops.precision import layer_norm, linear, matmul_dtype, narrow

HEAD_WIDTH = 32


class LayerNorm(nn.Module):
    """LN over the channels of (B, H, W, C), eps 1e-5, with a weight and no bias, never in half."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, H, W, C), stride 1, same padding, no bias.

    Args:
        channels: C.
        kernel_size: Odd.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise(x.to(matmul_dtype(x)), self.weight)


class Branch(nn.Module):
    """What the three branches share: the place of the gate."""

    def gated_layer(self) -> nn.Module:
        """Return the layer whose weight the gate is folded into."""
        raise NotImplementedError

    def gated_weight(self, gate: Tensor | None) -> Tensor | None:
        """Return that weight times the gate; None if both were fused into another weight."""
        weight = self.gated_layer().weight
        return weight if gate is None else weight * gate

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        """Fold the gate, and scales next to matrices, into the weights for good."""
        self.gated_layer().weight.mul_(gate)


@torch.no_grad()
def _fold_norm(norm: LayerNorm, following: nn.Linear) -> None:
    """Move the scales of a norm into the columns of the matrix that follows it."""
    following.weight.mul_(norm.weight)
    norm.weight = None


class PolyMLP(Branch):
    """Product of two projections in place of an activation (paper, PolyMLP).

    Args:
        channels: C.
        ratio: Width of the two projections together, over C; ``int(C * ratio)`` is even.
    """

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.norm = LayerNorm(width // 2)
        self.proj_out = nn.Linear(width // 2, channels, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        return ops.add_poly_mlp(
            x, keep, self.proj_in.weight, self.gated_weight(gate), self.proj_out.weight
        )

    def gated_layer(self) -> LayerNorm:
        return self.norm

    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        _fold_norm(self.norm, self.proj_out)


class PolyConv(Branch):
    """Product of a coarse and a fine depthwise convolution (paper, PolyConv).

    The inner channels are in the order of :func:`polynext_mm.nn.ops.partner_order`, not in the
    paper's.

    Args:
        channels: C.
        ratio: Inner width over C.
        coarse_size: Kernel size of the coarse convolution, which has dilation 2.
    """

    def __init__(self, channels: int, ratio: float, coarse_size: int):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.coarse_conv = DepthwiseConv(width, coarse_size)
        self.fine_conv = DepthwiseConv(width, 3)
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        return ops.add_poly_conv(
            x,
            keep,
            self.proj_in.weight,
            self.coarse_conv.weight,
            self.fine_conv.weight,
            self.smooth.weight,
            self.proj_out.weight,
            self.gated_weight(gate),
        )

    def gated_layer(self) -> LayerNorm:
        return self.norm


class PolyAttn(Branch):
    """Attention with the weights (1 + s q k^T)^4 in place of softmax (paper, PolyAttn)::

        qk, v = the halves of LN(x) W_in^T
        q, k, v = s * q_conv(qk), k_conv(qk), v_conv(v)
        x + keep * gate * smooth(poly_attention(q, k, v)) W_out^T

    Args:
        channels: C; there are ceil(C / 64) heads of width 32.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.num_heads = math.ceil(channels / 64)
        width = HEAD_WIDTH * self.num_heads
        self.norm = LayerNorm(channels)
        self.proj_in = nn.Linear(channels, 2 * width, bias=False)
        self.q_conv = DepthwiseConv(width, 5)
        self.k_conv = DepthwiseConv(width, 5)
        self.v_conv = DepthwiseConv(width, 3)
        self.scale_logit = nn.Parameter(torch.empty(self.num_heads))
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        w_in, w_q, w_k, w_v, w_smooth, w_out = narrow(
            x,
            self.proj_in.weight,
            self._scaled_q_weight(),
            self.k_conv.weight,
            self.v_conv.weight,
            self.gated_weight(gate),
            self.proj_out.weight,
        )
        t = self.norm(x).to(w_in.dtype)
        # Two products, so that both maps are contiguous: a convolution would copy half of a map.
        qk, v = (linear(t, half) for half in w_in.chunk(2))
        q, k, v = (ops.depthwise(*pair) for pair in ((qk, w_q), (qk, w_k), (v, w_v)))
        y = ops.poly_attention(*map(self._split_heads, (q, k, v)))
        y = y.transpose(1, 2).reshape(*x.shape[:3], -1)
        return ops.residual(x, linear(ops.depthwise(y, w_smooth), w_out), keep)

    def _split_heads(self, x: Tensor) -> Tensor:
        """View (B, H, W, heads * 32) as (B, heads, H * W, 32)."""
        return x.reshape(x.shape[0], -1, self.num_heads, HEAD_WIDTH).transpose(1, 2)

    def _scaled_q_weight(self) -> Tensor:
        """Return the weight of q_conv times the scale s of each head."""
        weight = self.q_conv.weight
        if self.scale_logit is None:
            return weight
        scale = self.scale_logit.sigmoid()[:, None, None, None]
        return (weight.unflatten(0, (self.num_heads, -1)) * scale[..., None]).flatten(0, 1)

    def gated_layer(self) -> DepthwiseConv:
        return self.smooth

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        self.q_conv.weight.copy_(self._scaled_q_weight())
        self.scale_logit = None
        _fold_norm(self.norm, self.proj_in)
