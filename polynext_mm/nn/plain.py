"""PolyNeXt as the paper writes it: (B, C, H, W), ordinary layers, whole attention matrices.

Read this first. It is the independent reference of the tests and the unoptimized baseline of the
benchmark: here autograd keeps every intermediate. Parameters have the names of the authors'
checkpoints. Drop path, the one part that training adds, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .arch import Arch, get_arch

HEAD_WIDTH = 32


def conv(in_channels: int, out_channels: int, size: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)


def depthwise(channels: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, size, stride, dilation * (size // 2), dilation, channels, bias=False
    )


class ChannelNorm(nn.Module):
    """LN over the channels at each position, with a weight and no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        variance = (x * x).mean(1, keepdim=True)
        return x / torch.sqrt(variance + 1e-5) * self.weight[:, None, None]


class RunningNorm(nn.Module):
    """A norm of a fully polynomial network, with statistics for every position of one map.

    Training uses the batch's statistics and updates the running ones, which inference uses.
    """

    num_batches_tracked: Tensor

    def statistics(self, **batch: Tensor) -> Iterator[Tensor]:
        for name, value in batch.items():
            running = getattr(self, name)
            if self.training:
                running.copy_(0.9 * running + 0.1 * value.detach())
            yield value if self.training else running
        self.num_batches_tracked += self.training


class ChannelBatchNorm(RunningNorm):
    """Norm over the batch and the channels at each position."""

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        self.gamma_c = nn.Parameter(torch.ones(channels))
        self.gamma_hw = nn.Parameter(torch.ones(1, 1, *size))
        self.register_buffer('running_mean', torch.zeros(1, 1, *size))
        self.register_buffer('running_var', torch.ones(1, 1, *size))
        self.register_buffer('num_batches_tracked', torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 1), keepdim=True)
        variance = (x - mean).square().mean((0, 1), keepdim=True)
        mean, variance = self.statistics(running_mean=mean, running_var=variance)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return x * self.gamma_hw * self.gamma_c[:, None, None]


class RowSumNorm(RunningNorm):
    """Division of attention by the mean row sum of batches."""

    def __init__(self, heads: int, size: tuple[int, int]):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, heads, size[0] * size[1], 1))
        self.register_buffer('running_denom', torch.ones_like(self.gamma))
        self.register_buffer('num_batches_tracked', torch.tensor(0))

    def forward(self, a: Tensor) -> Tensor:
        (denom,) = self.statistics(running_denom=a.sum(-1, keepdim=True).mean(0, keepdim=True))
        return a / (denom + 1e-6) * self.gamma


class Scale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class PolyAttn(nn.Module):
    """Attention with the weights (1 + s q k^T)^4, without the norm before it."""

    def __init__(self, channels: int, size: tuple[int, int] | None):
        super().__init__()
        self.heads = math.ceil(channels / 64)
        width = HEAD_WIDTH * self.heads
        self.scale = nn.Parameter(torch.full((1, self.heads, 1, 1), HEAD_WIDTH**-0.5).logit())
        self.qkv = conv(channels, 2 * width)
        self.q_conv = depthwise(width, 5)
        self.k_conv = depthwise(width, 5)
        self.v_conv = depthwise(width, 3)
        self.final_conv = depthwise(width, 3)
        self.proj = conv(width, channels)
        self.norm = RowSumNorm(self.heads, size) if size else None
        self.norm2 = ChannelBatchNorm(width, size) if size else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qk, v = self.qkv(x).chunk(2, 1)
        q, k, v = (self.tokens(t) for t in (self.q_conv(qk), self.k_conv(qk), self.v_conv(v)))
        a = (1 + self.scale.sigmoid() * (q @ k.transpose(2, 3))) ** 4
        a = self.norm(a) if self.norm else a / a.sum(-1, keepdim=True).clamp(min=1e-12)
        y = (a @ v).transpose(2, 3).reshape(len(x), -1, *x.shape[2:])
        return self.proj(self.norm2(self.final_conv(y)))

    def tokens(self, x: Tensor) -> Tensor:
        """Reshape (B, heads * 32, H, W) to (B, heads, H * W, 32)."""
        return x.reshape(len(x), self.heads, HEAD_WIDTH, -1).transpose(2, 3)


def map_size(height: int, width: int, stride: int) -> tuple[int, int]:
    return math.ceil(height / stride), math.ceil(width / stride)


def poly_conv(
    x: Tensor, project: nn.Module, coarse: nn.Module, fine: nn.Module, finish: nn.Module
) -> Tensor:
    b = project(x)
    return finish(coarse(b) * fine(b).flip(1))


def poly_mlp(x: Tensor, project: nn.Module, finish: nn.Module) -> Tensor:
    u, v = project(x).chunk(2, 1)
    return finish(u * v)


class Cell(nn.Module):
    """Map (s0, s1) to the next feature. ``ops`` holds the layers of all stacks in one list."""

    def __init__(self, arch: Arch, stage: int, size: tuple[int, int] | None):
        super().__init__()
        width = arch.widths[stage]
        norm = partial(ChannelBatchNorm, size=size) if size else ChannelNorm
        self.attends = arch.mixers[stage] == 'attn'
        self.gates = [arch.gates(stack) for stack in range(arch.stacks[stage])]
        self.preprocess0 = Scale(width)
        self.preprocess1 = Scale(width)
        self.postprocess = norm(width)
        self.skip_weight = nn.Parameter(torch.tensor(arch.gate_init))
        inner = int(width * arch.conv_ratios[stage])
        hidden = int(width * arch.mlp_ratios[stage])
        self.ops = nn.ModuleList()
        for _ in self.gates:
            if self.attends:
                self.ops.append(nn.Sequential(norm(width), PolyAttn(width, size)))
            else:
                self.ops.extend(
                    [
                        conv(width, inner),
                        depthwise(inner, arch.coarse_sizes[stage], dilation=2),
                        depthwise(inner, 3),
                        nn.Sequential(depthwise(inner, 3), conv(inner, width), norm(width)),
                    ]
                )
            self.ops.extend(
                [
                    conv(width, hidden),
                    nn.Sequential(norm(hidden // 2), conv(hidden // 2, width)),
                ]
            )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        x = self.postprocess(self.preprocess0(s0) + self.preprocess1(s1))
        gate = self.skip_weight.sigmoid()
        ops, count = list(self.ops), len(self.ops) // len(self.gates)
        for i, (mixer_gate, mlp_gate) in enumerate(self.gates):
            *mixer, project, finish = ops[count * i : count * (i + 1)]
            mixed = mixer[0](x) if self.attends else poly_conv(x, *mixer)
            x = x + gate[mixer_gate] * mixed
            x = x + gate[mlp_gate] * poly_mlp(x, project, finish)
        return x


class PlainPolyNeXt(nn.Module):
    """Stem and cells; returns the feature of every stage, (B, C, ceil(H / s), ceil(W / s)) for the
    strides s = 4, 8, 16, 32 (low resolution: 1, 2, 4).

    Args:
        arch: As for :class:`polynext_mm.nn.PolyNeXt`.
        norm_size: Height and width of the images of a fully polynomial network (norm 'bn'), or None
            for one with LN.
    """

    def __init__(self, arch, norm_size: tuple[int, int] | None = None):
        super().__init__()
        arch = get_arch(arch)
        self.depths = arch.depths
        self.stem = conv(3, arch.widths[0], arch.stem_size, arch.stem_stride)
        self.cells = nn.ModuleList(
            Cell(arch, stage, norm_size and map_size(*norm_size, stride))
            for stage, (depth, stride) in enumerate(zip(arch.depths, arch.strides))
            for _ in range(depth)
        )
        self.reductions = nn.ModuleList(
            conv(before, after, 3, 2)
            if kind == 'full3x3'
            else nn.Sequential(depthwise(before, 3, 2), conv(before, after))
            for before, after in zip(arch.widths, arch.widths[1:])
            for kind in arch.downsampling
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        s0 = s1 = self.stem(x)
        cells, reductions = iter(self.cells), iter(self.reductions)
        features = []
        for stage, depth in enumerate(self.depths):
            if stage > 0:
                s0, s1 = next(reductions)(s0), next(reductions)(s1)
            for _ in range(depth):
                s0, s1 = s1, next(cells)(s0, s1)
            features.append(s1)
        return features
