"""The parts of a network: stacks in cells, cells and downsampling in stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .arch import Arch
from .batch_norm import PositionNorm
from .layers import Branch, LayerNorm, MakeNorm, PolyAttn, PolyConv, PolyMLP
from .ops import dispatch
from .stock import is_observed, kernel_weights


class Stack(nn.Module):
    """A mixer and a PolyMLP on the residual stream.

    Args:
        arch: The network's.
        stage: Which of its stages, from 0.
        norm: Makes the norms.
    """

    def __init__(self, arch: Arch, stage: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = arch.widths[stage]
        if arch.mixers[stage] == 'attn':
            self.mixer: Branch = PolyAttn(width, norm)
        else:
            self.mixer = PolyConv(width, arch.conv_ratios[stage], arch.coarse_sizes[stage], norm)
        self.mlp = PolyMLP(width, arch.mlp_ratios[stage], norm)

    def forward(
        self,
        x: Tensor,
        gates: tuple[Tensor | None, Tensor | None] = (None, None),
        keep: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Add both branches to the residual stream.

        Args:
            x: (B, H, W, C).
            gates: sigmoid(lam) of the mixer and of the PolyMLP, scalars, or None for 1.
            keep: Factors of drop path of both, (2, B, 1, 1, 1), or None for 1.
            out: Where the results may be written, as of :meth:`Branch.forward`.
        """
        keep_mixer, keep_mlp = (None, None) if keep is None else keep.unbind()
        x = self.mixer(x, gates[0], keep_mixer, out)  # x + keep * gate * mixer(x)
        return self.mlp(x, gates[1], keep_mlp, out)  # x + keep * gate * PolyMLP(x)

    def fuse(self, gates: tuple[Tensor, Tensor]) -> None:
        """Fold gates and scales of both branches into their weights, irreversibly."""
        self.mixer.fuse(gates[0])
        self.mlp.fuse(gates[1])


class Cell(nn.Module):
    """Map the running pair (s0, s1) to the next feature (paper, cell)::

        x = LN(a0 * s0 + a1 * s1)
        for each stack:
            x = x + sigmoid(lam[m]) * DropPath(mixer(x))
            x = x + sigmoid(lam[p]) * DropPath(PolyMLP(x))

    Args:
        arch: The network's.
        stage: Which of its stages, from 0.
        drop_path_rate: Of every branch.
        norm: Makes the norms.
    """

    def __init__(self, arch: Arch, stage: int, drop_path_rate: float, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = arch.widths[stage]
        self.drop_path_rate = drop_path_rate
        self.scale0 = nn.Parameter(torch.ones(width))
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm = norm(width)
        self.gate_init = arch.gate_init
        logits = nn.Parameter(torch.tensor(arch.gate_init, dtype=torch.float32))
        self.gate_logits: nn.Parameter | None = logits
        stacks = nn.ModuleList(Stack(arch, stage, norm) for _ in range(arch.stacks[stage]))
        self.stacks = cast('Sequence[Stack]', stacks)
        self._gate_indices = [arch.gates(i) for i in range(arch.stacks[stage])]

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        weights = kernel_weights(self, {'norm': LayerNorm})
        weight = weights[0] if weights else None
        if weight is None:
            x = self.norm(self.scale0 * s0 + self.scale1 * s1)
        else:
            x = ops.norm_of_pair(s0, s1, self.scale0, self.scale1, weight)
        out = x if weight is not None and self._may_overwrite(x) else None
        for stack, gates in zip(self.stacks, self._gates()):
            x = stack(x, gates, self._keep(x), out)
        return x

    def _may_overwrite(self, x: Tensor) -> bool:
        """Return whether the kernels of all stacks may write into ``x``, a map that no hook saw.

        On CPUs inference then takes .96 of the time (C-S and A-S at 512x512, two cores). Hooks must
        see maps that do not change later.
        """
        if x.device.type != 'cpu' or torch.is_grad_enabled():
            return False
        return not (
            is_observed(self)
            or any(
                is_observed(stack) or is_observed(stack.mixer) or is_observed(stack.mlp)
                for stack in self.stacks
            )
        )

    def _gates(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return sigmoid(lam) of every stack's branches; None where it was fused."""
        if self.gate_logits is None:
            return [(None, None)] * len(self.stacks)
        gates = self.gate_logits.sigmoid().unbind()
        return [(gates[mixer], gates[mlp]) for mixer, mlp in self._gate_indices]

    def _keep(self, x: Tensor) -> Tensor | None:
        """Draw the factors of drop path (stochastic depth) for both branches of a stack.

        A branch is dropped for whole samples, and scaled for the others; None stands for 1.
        """
        if not self.training or self.drop_path_rate == 0:
            return None
        rate = 1 - self.drop_path_rate
        keep = x.new_empty(2, len(x), 1, 1, 1).bernoulli_(rate)
        return keep / rate if rate > 0 else keep

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize for training from scratch."""
        nn.init.ones_(self.scale0)
        nn.init.ones_(self.scale1)
        if self.gate_logits is not None:
            self.gate_logits.copy_(torch.tensor(self.gate_init))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold gates and scales into neighbouring weights, irreversibly."""
        if self.gate_logits is None:
            return
        gates = self.gate_logits.sigmoid().unbind()
        for stack, (mixer, mlp) in zip(self.stacks, self._gate_indices):
            stack.fuse((gates[mixer], gates[mlp]))
        self.gate_logits = None
        if isinstance(self.norm, PositionNorm):
            self.norm.fold_back(self.scale0, self.scale1)


class Downsample(nn.Module):
    """Halve the resolution of (B, H, W, C), rounding up, and change its width.

    Args:
        kind: 'sep3x3', a depthwise 3x3 convolution and a 1x1, or 'full3x3', a dense one.
        in_channels: C.
        out_channels: The width of the next stage.
    """

    def __init__(self, kind: str, in_channels: int, out_channels: int):
        super().__init__()
        if kind == 'sep3x3':
            self.depthwise = nn.Conv2d(
                in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False
            )
            self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for conv in self.children():
            x = conv(x)
        return x.permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Downsampling of the pair (none before the first stage) and the cells of one resolution.

    Args:
        arch: The network's.
        index: Which of its stages, from 0.
        drop_path_rates: One for each cell.
        with_cp: Checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Largest norm of the gradient at a cell's output, or None.
        norm: Makes the norms.
    """

    def __init__(
        self,
        arch: Arch,
        index: int,
        drop_path_rates: list[float],
        with_cp: bool,
        grad_clip_norm: float | None,
        norm: MakeNorm = LayerNorm,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.grad_clip_norm = grad_clip_norm
        if index > 0:
            self.downsample: nn.ModuleList | None = nn.ModuleList(
                Downsample(kind, arch.widths[index - 1], arch.widths[index])
                for kind in arch.downsampling
            )
        else:
            self.downsample = None
        cells = nn.ModuleList(Cell(arch, index, rate, norm) for rate in drop_path_rates)
        self.cells = cast('Sequence[Cell]', cells)

    def forward(
        self, s0: Tensor, s1: Tensor, loss_scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Map the pair to the last two features.

        Args:
            s0: The older map of the pair, (B, H, W, C).
            s1: The newer one.
            loss_scale: The factor on the loss, only for the gradient clip.
        """
        if self.downsample is not None:
            s0, s1 = (shrink(s) for shrink, s in zip(self.downsample, (s0, s1)))
        for cell in self.cells:
            s0, s1 = s1, self._clipped(self._call(cell, s0, s1), loss_scale)
        return s0, s1

    def _call(self, cell: Cell, s0: Tensor, s1: Tensor) -> Tensor:
        if not (self.with_cp and torch.is_grad_enabled()):
            return cell(s0, s1)
        if not (isinstance(cell.norm, PositionNorm) or dispatch.plain_wanted()):
            return checkpoint(cell, s0, s1, use_reentrant=False)
        contexts = dispatch.checkpoint_contexts  # only when needed: compilers cannot trace them
        return checkpoint(cell, s0, s1, use_reentrant=False, context_fn=contexts)

    def _clipped(self, x: Tensor, loss_scale: float | Tensor) -> Tensor:
        if self.grad_clip_norm is None or not x.requires_grad or dispatch.exporting():
            return x
        return ops.clip_gradient(x, self.grad_clip_norm, loss_scale)
