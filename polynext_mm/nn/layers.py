"""The layers of a cell. Maps are (B, H, W, C) in memory and in shape.

The three branches, :class:`PolyMLP`, :class:`PolyConv` and :class:`PolyAttn`, are called with the
residual stream x and return ``x + keep * gate * F(x)``, F being what the paper gives the branch's
name to:

- ``gate``, a scalar, is the branch's sigmoid(lam), or None for 1. It is folded into the smallest
  weight at the end of the branch, so that it scales neither a map nor a matrix.
- ``keep``, (B, 1, 1, 1), is the factor of drop path, or None for 1.

Every branch takes its kind of norm as ``norm``: :class:`LayerNorm`, or a maker of the norms of a
fully polynomial network (:class:`~polynext_mm.nn.batch_norm.BatchNorms`).

The layers inside a branch hold its weights; the branch passes these to an operation of
:mod:`polynext_mm.nn.ops` and does not call all of the layers. Hooks belong on the branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import ops
from .batch_norm import BatchNorms, ChannelBatchNorm
from .ops import poly_attn, poly_conv, poly_mlp
from .ops.precision import narrow

HEAD_WIDTH = 32


class LayerNorm(nn.Module):
    """LN over the channels of (B, H, W, C), eps 1e-5, with a weight and no bias, never in half."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight)

    @torch.no_grad()
    def fold_forward(self, following: nn.Linear) -> None:
        """Move the weight into the columns of the matrix that follows."""
        following.weight.mul_(self.weight)
        self.weight = None


#: LayerNorm, or what makes another norm of a number of channels.
MakeNorm = Callable[[int], nn.Module]


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
        return ops.depthwise(x, self.weight)


class Branch(nn.Module):
    """What the three branches share: their arguments, and the place of the gate."""

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        keep: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Add the branch to the residual stream.

        Args:
            x: (B, H, W, C).
            gate: A scalar, or None for 1.
            keep: The factor of drop path, (B, 1, 1, 1), or None for 1.
            out: Where the result may be written without gradients: contiguous, like ``x`` or ``x``
                itself. By default a new map is returned.
        """
        raise NotImplementedError

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


class PolyMLP(Branch):
    """Product of two projections in place of an activation (paper, PolyMLP).

    Args:
        channels: C.
        ratio: Width of the two projections together, over C; ``int(C * ratio)`` is even.
        norm: Makes the norm.
    """

    def __init__(self, channels: int, ratio: float, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.norm = norm(width // 2)
        self.proj_out = nn.Linear(width // 2, channels, bias=False)

    def forward(self, x, gate=None, keep=None, out=None):
        w_in, w_out = self.proj_in.weight, self.proj_out.weight
        if isinstance(self.norm, ChannelBatchNorm):
            norm = partial(self.norm, gate=gate)
            return poly_mlp.plain_with_norm(norm, x, keep, *narrow(x, w_in, w_out))
        return ops.add_poly_mlp(x, keep, w_in, self.gated_weight(gate), w_out, out)

    def gated_layer(self) -> nn.Module:
        return self.norm

    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        self.norm.fold_forward(self.proj_out)


class PolyConv(Branch):
    """Product of a coarse and a fine depthwise convolution (paper, PolyConv).

    The inner channels are in the order of :func:`polynext_mm.nn.ops.partner_order`, not in the
    paper's.

    Args:
        channels: C.
        ratio: Inner width over C.
        coarse_size: Kernel size of the coarse convolution, which has dilation 2.
        norm: Makes the norm.
    """

    def __init__(self, channels: int, ratio: float, coarse_size: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.coarse_conv = DepthwiseConv(width, coarse_size)
        self.fine_conv = DepthwiseConv(width, 3)
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)
        self.norm = norm(channels)

    def forward(self, x, gate=None, keep=None, out=None):
        weights = (
            self.proj_in.weight,
            self.coarse_conv.weight,
            self.fine_conv.weight,
            self.smooth.weight,
            self.proj_out.weight,
        )
        if isinstance(self.norm, ChannelBatchNorm):
            norm = partial(self.norm, gate=gate)
            return poly_conv.plain_with_norm(norm, x, keep, *narrow(x, *weights))
        return ops.add_poly_conv(x, keep, *weights, self.gated_weight(gate), out)

    def gated_layer(self) -> nn.Module:
        return self.norm

    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        if isinstance(self.norm, ChannelBatchNorm):
            self.norm.fold_back(self.proj_out.weight)


class PolyAttn(Branch):
    """Attention with the weights (1 + s q k^T)^4 in place of softmax (paper, PolyAttn)::

        qk, v = the halves of LN(x) W_in^T
        q, k, v = s * q_conv(qk), k_conv(qk), v_conv(v)
        x + keep * gate * smooth(poly_attention(q, k, v)) W_out^T

    In a fully polynomial network ``row_norm`` divides attention by a running average of its row
    sums instead of the sums themselves, and ``smooth_norm`` follows ``smooth``.

    Args:
        channels: C; there are ceil(C / 64) heads of width 32.
        norm: Makes the norm.
    """

    def __init__(self, channels: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        self.num_heads = math.ceil(channels / 64)
        width = HEAD_WIDTH * self.num_heads
        self.norm = norm(channels)
        self.proj_in = nn.Linear(channels, 2 * width, bias=False)
        self.q_conv = DepthwiseConv(width, 5)
        self.k_conv = DepthwiseConv(width, 5)
        self.v_conv = DepthwiseConv(width, 3)
        self.scale_logit = nn.Parameter(torch.empty(self.num_heads))
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)
        polynomial = isinstance(norm, BatchNorms)
        self.row_norm = norm.of_rows(self.num_heads) if polynomial else None
        self.smooth_norm = norm(width) if polynomial else None

    def forward(self, x, gate=None, keep=None, out=None):
        polynomial = self.row_norm is not None
        weights = (
            self.proj_in.weight,
            self._scaled_q_weight(),
            self.k_conv.weight,
            self.v_conv.weight,
            self.smooth.weight if polynomial else self.gated_weight(gate),
            self.proj_out.weight,
        )
        if polynomial:
            attention = partial(self.row_norm, size=tuple(x.shape[1:3]))
            norms = (self.norm, attention, partial(self.smooth_norm, gate=gate))
            return poly_attn.plain_with_norms(*norms, x, keep, self.num_heads, *narrow(x, *weights))
        return ops.add_poly_attn(x, keep, self.num_heads, self.norm.weight, *weights, out)

    def _scaled_q_weight(self) -> Tensor:
        """Return the weight of q_conv times the scale s of each head."""
        weight = self.q_conv.weight
        if self.scale_logit is None:
            return weight
        scale = self.scale_logit.sigmoid()[:, None, None, None]
        return (weight.unflatten(0, (self.num_heads, -1)) * scale[..., None]).flatten(0, 1)

    def gated_layer(self) -> nn.Module:
        return self.smooth if self.smooth_norm is None else self.smooth_norm

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        self.q_conv.weight.copy_(self._scaled_q_weight())
        self.scale_logit = None
        self.norm.fold_forward(self.proj_in)
        if self.smooth_norm is not None:
            self.smooth_norm.fold_forward(self.proj_out)
