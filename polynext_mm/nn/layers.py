"""The three branches of a PolyNeXt cell. Tensors are (B, H, W, C) in memory and in shape.

A branch is called with the residual stream x, its gate and ``keep``, and returns x with itself added,
in the place of x where no gradient is needed. The gate, the scalar sigmoid(lam) of the cell, is folded
into the smallest weight at the branch's end: the result is the same and neither a map nor a matrix is
scaled. After ``fuse()`` it is part of the weights for good and is passed as None. ``keep`` (B, 1, 1, 1)
or None is what drop path multiplies the branch by.
"""

import math

import torch
from torch import Tensor, nn

from . import ops
from .attention import polynomial_attention
from .depthwise import depthwise
from .precision import matmul_dtype

HEAD_WIDTH = 32


def _gated(weight: Tensor, gate: Tensor | None) -> Tensor:
    return weight if gate is None else weight * gate


@torch.no_grad()
def _fold_norm_into(norm: 'LayerNorm', linear: nn.Linear) -> None:
    """Move a norm's channel scales into the columns of the product that follows it."""
    linear.weight.mul_(norm.weight)
    norm.weight = None


class LayerNorm(nn.Module):
    """LN over the channels of (B, H, W, C), eps 1e-5, with a weight and no bias, never in half."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, H, W, C), stride 1, same padding, no bias.

    Args:
        channels (int): C.
        kernel_size (int): Odd.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x.to(matmul_dtype(x)), self.weight)


class PolyMLP(nn.Module):
    """Product of two projections in place of an activation (paper: PolyMLP).

    Args:
        channels (int): C.
        ratio (float): Width of the two projections together, over C; ``int(C * ratio)`` is even.
    """

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.norm = LayerNorm(width // 2)
        self.proj_out = nn.Linear(width // 2, channels, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None, keep: Tensor | None) -> Tensor:
        return ops.add_poly_mlp(
            x, keep, self.proj_in.weight, _gated(self.norm.weight, gate), self.proj_out.weight
        )

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        self.proj_out.weight.mul_(gate)
        _fold_norm_into(self.norm, self.proj_out)


class PolyConv(nn.Module):
    """Product of a coarse and a fine depthwise convolution (paper: PolyConv).

    The inner channels are in the order of :func:`ops.partner_order`, not in the paper's.

    Args:
        channels (int): C.
        ratio (float): Inner width over C.
        coarse_size (int): Kernel of the coarse convolution, which has dilation 2.
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

    def forward(self, x: Tensor, gate: Tensor | None, keep: Tensor | None) -> Tensor:
        return ops.add_poly_conv(
            x,
            keep,
            self.proj_in.weight,
            self.coarse_conv.weight,
            self.fine_conv.weight,
            self.smooth.weight,
            self.proj_out.weight,
            _gated(self.norm.weight, gate),
        )

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        self.norm.weight.mul_(gate)


class PolyAttn(nn.Module):
    """Attention with the weights (1 + s q k^T)^4 in place of softmax (paper: PolyAttn).

    Args:
        channels (int): C; there are ceil(C / 64) heads of 32.
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

    def forward(self, x: Tensor, gate: Tensor | None, keep: Tensor | None) -> Tensor:
        qk, v = self.proj_in(self.norm(x)).chunk(2, -1)
        q = depthwise(qk, self._scaled_q_weight())
        q, k, v = (self._split_heads(t) for t in (q, self.k_conv(qk), self.v_conv(v)))
        y = polynomial_attention(q, k, v)
        y = y.transpose(1, 2).reshape(*x.shape[:3], -1)
        y = depthwise(y, _gated(self.smooth.weight, gate))
        return ops.add_linear(x, keep, y, self.proj_out.weight)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, heads * 32) to (B, heads, H * W, 32)."""
        return x.reshape(x.shape[0], -1, self.num_heads, HEAD_WIDTH).transpose(1, 2)

    def _scaled_q_weight(self) -> Tensor:
        if self.scale_logit is None:
            return self.q_conv.weight
        scale = self.scale_logit.sigmoid().repeat_interleave(HEAD_WIDTH)
        return self.q_conv.weight * scale[:, None, None, None]

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        self.q_conv.weight.copy_(self._scaled_q_weight())
        self.scale_logit = None
        self.proj_out.weight.mul_(gate)
        _fold_norm_into(self.norm, self.proj_in)
