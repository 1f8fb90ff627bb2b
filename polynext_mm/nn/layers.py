"""The layers of a cell. Maps are (B, H, W, C) in memory and in shape.

The three branches, :class:`PolyMLP`, :class:`PolyConv` and :class:`PolyAttn`, are called with the
residual stream x and return ``x + keep * gate * F(x)``, where F is the paper's function of that
name:

- ``gate``, a scalar, is the branch's sigmoid(lam), or None for 1.
- ``keep``, (B, 1, 1, 1), is the drop path factor, or None for 1.

``forward`` is the paper's equation in calls of the branch's own layers. A kernel in
:mod:`polynext_mm.nn.ops` computes the same without calling them. It runs if every layer is exactly
the one made here (:mod:`polynext_mm.nn.stock`), so whatever replaces a layer or hooks into it
works, and only that branch goes without its kernel. Compilers and exports use the equation too.

Every branch takes its kind of norm as ``norm``: :class:`LayerNorm`, or a maker of the norms of a
fully polynomial network (:class:`~polynext_mm.nn.batch_norm.BatchNorms`), which have no kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .batch_norm import BatchNorms, ChannelBatchNorm
from .ops import dispatch
from .ops.depthwise import copies as copies_of_conv
from .ops.norms import copies as copies_of_norm
from .ops.precision import Like, matmul_dtype
from .ops.ready import Wanted, ready
from .ops.stream import NarrowStream
from .stock import kernel_weights

HEAD_WIDTH = 32


class LayerNorm(nn.Module):
    """LN over the channels of (B, H, W, C), never in half precision; with a weight, but no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    @torch.no_grad()
    def fold_forward(self, following: nn.Linear) -> None:
        """Move the weight into the columns of the following matrix."""
        if self.weight is not None:
            following.weight.mul_(self.weight)
        self.weight = None


#: LayerNorm, or another function that makes a norm for a number of channels.
MakeNorm = Callable[[int], 'LayerNorm | ChannelBatchNorm']


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, H, W, C), stride 1, same padding, no bias.

    Args:
        channels: C.
        kernel_size: Odd.
    """

    dilation: ClassVar[int] = 1

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise(x, self.weight, self.dilation)


class DilatedConv(DepthwiseConv):
    """:class:`DepthwiseConv` with dilation 2."""

    dilation = 2


class Branch(nn.Module):
    """Base of the three branches: their arguments, and the choice of their kernel."""

    #: The layers that the kernel replaces, with their classes, in the order of its weights.
    kinds: ClassVar[Mapping[str, type[nn.Module]]] = {}
    #: The layer whose weight the gate is folded into for the kernel and in deployment. It is the
    #: smallest weight at the end of the branch, so that the gate scales neither a map nor a matrix.
    gated: str
    #: Whether the kernel reads the residual stream only in the dtype of products.
    reads_narrow: ClassVar[bool] = True
    #: A layer with a factor on each equal part of its weight: see :meth:`logit_of_scale`.
    scaled: ClassVar[str | None] = None

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        keep: Tensor | None = None,
        out: Tensor | None = None,
        weights: Sequence[Tensor | None] | None = None,
        stream: NarrowStream | None = None,
    ) -> Tensor:
        """Add the branch to the residual stream.

        Args:
            x: (B, H, W, C).
            gate: A scalar, or None for 1.
            keep: The drop path factor, (B, 1, 1, 1), or None for 1.
            out: Where a kernel may write the result if no gradient is needed: contiguous, like
                ``x`` or ``x`` itself. By default a new map is returned.
            weights: For the kernel, if the stage has prepared those of all its branches; by default
                the branch prepares its own.
            stream: Where kernels leave narrow copies of the residual stream, or None.
        """
        raise NotImplementedError

    def stock_weights(self) -> list[Tensor | None] | None:
        """Return the weights of ``kinds``, or None if the layers must be called instead."""
        return kernel_weights(self, self.kinds)

    def wanted(
        self,
        weights: Sequence[Tensor | None],
        x: Tensor | Like,
        gate: Tensor | None,
        scale: Tensor | None,
    ) -> list[Wanted | None]:
        """Return the weights and the forms in which the kernel needs them on ``x``.

        Args:
            weights: Of ``kinds``.
            x: The map, or one like it.
            gate: (1,), or None for 1.
            scale: Factors on equal parts of ``scaled``, or None for 1.
        """
        factors = {self.gated: gate, self.scaled: scale}
        return [
            None if weight is None else wanted_by(kind, x, weight, factors.get(name))
            for (name, kind), weight in zip(self.kinds.items(), weights)
        ]

    def kernel_weights(
        self, x: Tensor, gate: Tensor | None, ready: Sequence[Tensor | None] | None
    ) -> Sequence[Tensor | None] | None:
        """Return what the kernel takes, or None if the layers must be called instead."""
        if ready is not None and dispatch.kernels_allowed():
            return ready
        weights = self.stock_weights()
        if weights is None:
            return None
        gate = None if gate is None else gate.view(1)
        logit = self.logit_of_scale()
        scale = None if logit is None else logit.sigmoid()
        return made_ready(self.wanted(weights, x, gate, scale))

    def logit_of_scale(self) -> Tensor | None:
        """Return the logits whose sigmoids are the factors of ``scaled``, or None for 1."""
        return None

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        """Fold the gate, and scales next to matrices, into the weights, irreversibly."""
        getattr(self, self.gated).weight.mul_(gate)


class PolyMLP(Branch):
    """Product of two projections in place of an activation (paper, PolyMLP)::

        u, v = the halves of proj_in(x)
        x + keep * gate * proj_out(norm(u * v))

    Args:
        channels: C.
        ratio: Combined width of the two projections, over C; ``int(C * ratio)`` is even.
        norm: Makes the norm.
    """

    kinds = {'proj_in': nn.Linear, 'norm': LayerNorm, 'proj_out': nn.Linear}
    gated = 'norm'

    def __init__(self, channels: int, ratio: float, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.norm = norm(width // 2)
        self.proj_out = nn.Linear(width // 2, channels, bias=False)

    def forward(self, x, gate=None, keep=None, out=None, weights=None, stream=None):
        weights = self.kernel_weights(x, gate, weights)
        if weights is not None:
            return ops.add_poly_mlp(x, keep, *weights, out=out, stream=stream)
        u, v = self.proj_in(kept(x, out)).chunk(2, -1)
        return ops.residual(x, self.proj_out(self.norm(u * v)), gate, keep)

    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        self.norm.fold_forward(self.proj_out)


class PolyConv(Branch):
    """Product of a coarse and a fine depthwise convolution (paper, PolyConv)::

        b = proj_in(x)
        x + keep * gate * norm(proj_out(smooth(coarse_conv(b) * swap(fine_conv(b)))))

    The inner channels are in the order of :func:`polynext_mm.nn.ops.partner_order`, in which
    ``swap`` is the paper's reversal of the channels.

    Args:
        channels: C.
        ratio: Inner width over C.
        coarse_size: Kernel size of the coarse convolution, which has dilation 2.
        norm: Makes the norm.
    """

    kinds = {
        'proj_in': nn.Linear,
        'coarse_conv': DilatedConv,
        'fine_conv': DepthwiseConv,
        'smooth': DepthwiseConv,
        'proj_out': nn.Linear,
        'norm': LayerNorm,
    }
    gated = 'norm'

    def __init__(self, channels: int, ratio: float, coarse_size: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = int(channels * ratio)
        self.proj_in = nn.Linear(channels, width, bias=False)
        self.coarse_conv = DilatedConv(width, coarse_size)
        self.fine_conv = DepthwiseConv(width, 3)
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)
        self.norm = norm(channels)

    def forward(self, x, gate=None, keep=None, out=None, weights=None, stream=None):
        weights = self.kernel_weights(x, gate, weights)
        if weights is not None:
            return ops.add_poly_conv(x, keep, *weights, out=out, stream=stream)
        b = self.proj_in(kept(x, out))
        product = self.coarse_conv(b) * ops.swap_partners(self.fine_conv(b))
        return ops.residual(x, self.norm(self.proj_out(self.smooth(product))), gate, keep)

    def fuse(self, gate: Tensor) -> None:
        super().fuse(gate)
        if isinstance(self.norm, ChannelBatchNorm):
            self.norm.fold_back(self.proj_out.weight)


class PolyAttn(Branch):
    """Attention with the weights (1 + s q k^T)^4 in place of softmax (paper, PolyAttn)::

        qk, v = the halves of proj_in(norm(x))
        q, k, v = s * q_conv(qk), k_conv(qk), v_conv(v)
        x + keep * gate * proj_out(smooth(poly_attention(q, k, v)))

    s is a scale per head. In a fully polynomial network ``row_norm`` divides attention by a running
    average of its row sums instead of the sums themselves, and ``smooth_norm`` follows ``smooth``.

    Args:
        channels: C; there are ceil(C / 64) heads of width 32.
        norm: Makes the norm.
    """

    kinds = {
        'norm': LayerNorm,
        'proj_in': nn.Linear,
        'q_conv': DepthwiseConv,
        'k_conv': DepthwiseConv,
        'v_conv': DepthwiseConv,
        'smooth': DepthwiseConv,
        'proj_out': nn.Linear,
    }
    gated = 'smooth'
    scaled = 'q_conv'
    reads_narrow = False  # its norm reads the wide stream

    def __init__(self, channels: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        self.num_heads = math.ceil(channels / 64)
        width = HEAD_WIDTH * self.num_heads
        self.norm = norm(channels)
        self.proj_in = nn.Linear(channels, 2 * width, bias=False)
        self.q_conv = DepthwiseConv(width, 5)
        self.k_conv = DepthwiseConv(width, 5)
        self.v_conv = DepthwiseConv(width, 3)
        self.scale_logit: nn.Parameter | None = nn.Parameter(torch.empty(self.num_heads))
        self.smooth = DepthwiseConv(width, 3)
        self.proj_out = nn.Linear(width, channels, bias=False)
        self.row_norm = norm.of_rows(self.num_heads) if isinstance(norm, BatchNorms) else None
        self.smooth_norm = norm(width) if isinstance(norm, BatchNorms) else None

    def forward(self, x, gate=None, keep=None, out=None, weights=None, stream=None):
        weights = self.kernel_weights(x, gate, weights)
        if weights is not None:
            return ops.add_poly_attn(x, keep, self.num_heads, *weights, out=out, stream=stream)
        qk, v = self.proj_in(self.norm(kept(x, out))).chunk(2, -1)
        q, k, v = (
            ops.split_heads(a, self.num_heads)
            for a in (self.q_conv(qk), self.k_conv(qk), self.v_conv(v))
        )
        if self.scale_logit is not None:
            q = (q * self.scale_logit.sigmoid()[:, None, None]).to(q.dtype)
        if self.row_norm is None:
            attended = ops.poly_attention(q, k, v)
        else:
            attended = self.row_norm(q, k, v, size=tuple(x.shape[1:3]))
        y = self.smooth(ops.merge_heads(attended, x))
        if self.smooth_norm is not None:
            y = self.smooth_norm(y)
        return ops.residual(x, self.proj_out(y), gate, keep)

    def logit_of_scale(self):
        return self.scale_logit

    def reset_parameters(self) -> None:
        if self.scale_logit is not None:
            nn.init.constant_(self.scale_logit, -math.log(HEAD_WIDTH**0.5 - 1))  # logit of 32^-.5

    @torch.no_grad()
    def fuse(self, gate: Tensor) -> None:
        gated = self.smooth if self.smooth_norm is None else self.smooth_norm
        if gated.weight is not None:
            gated.weight.mul_(gate)
        if self.scale_logit is not None:
            per_head = self.q_conv.weight.view(self.num_heads, -1)
            per_head.mul_(self.scale_logit.sigmoid()[:, None])
        self.scale_logit = None
        self.norm.fold_forward(self.proj_in)
        if self.smooth_norm is not None:
            self.smooth_norm.fold_forward(self.proj_out)


def wanted_by(
    kind: type[nn.Module], x: Tensor | Like, weight: Tensor, factor: Tensor | None = None
) -> Wanted:
    """Return a weight and the form in which a kernel needs it on ``x``, depending on its layer."""
    dtype = weight.dtype if kind is LayerNorm else matmul_dtype(x)
    copies = 0
    if kind is LayerNorm and dtype is torch.float32:  # the dtype of the sums
        copies = copies_of_norm(x, len(weight))
    elif kind is DilatedConv:
        copies = copies_of_conv(x, weight, DilatedConv.dilation)
    if kind is DilatedConv and copies:
        return Wanted(weight, torch.float32, factor, True, copies * torch.is_grad_enabled())
    return Wanted(weight, dtype, factor, False, copies * torch.is_grad_enabled())


def made_ready(wanted: Sequence[Wanted | None]) -> list[Tensor | None]:
    """Return the prepared weights; None stays None."""
    made = iter(ready([w for w in wanted if w is not None]))
    return [None if w is None else next(made) for w in wanted]


def kept(x: Tensor, out: Tensor | None) -> Tensor:
    """Return ``x``, or a copy if a later kernel may overwrite it (``out``).

    Layers and their hooks may hold on to their inputs.
    """
    return x.clone() if x is out else x
