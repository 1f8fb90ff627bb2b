"""The parts of a network: stacks make up cells; cells and downsampling make up stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .arch import Arch
from .batch_norm import PositionNorm
from .layers import Branch, LayerNorm, MakeNorm, PolyAttn, PolyConv, PolyMLP
from .ops import dispatch
from .ops.precision import wide_dtype
from .ops.stream import NarrowStream, narrow_stream
from .stage_weights import BranchWeights, CellWeights, StageWeights
from .stock import calls_its_own_forward, is_observed, kernel_weights


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
        weights: tuple[BranchWeights, BranchWeights] | None = None,
        stream: NarrowStream | None = None,
    ) -> Tensor:
        """Add both branches to the residual stream.

        Args:
            x: (B, H, W, C).
            gates: sigmoid(lam) of the mixer and of the PolyMLP, scalars, or None for 1.
            keep: Drop path factors of both, (2, B, 1, 1, 1), or None for 1.
            out: Where the results may be written, as for :meth:`Branch.forward`.
            weights: For the kernels of both, likewise.
            stream: Likewise.
        """
        keeps = (None, None) if keep is None else keep.unbind()
        for i, branch in enumerate((self.mixer, self.mlp)):
            ready = () if weights is None else (weights[i], stream)
            x = branch(x, gates[i], keeps[i], out, *ready)  # x + keep * gate * branch(x)
        return x

    def fuse(self, gates: tuple[Tensor, Tensor]) -> None:
        """Fold both branches' gates and scales into their weights, irreversibly."""
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
        drop_path_rate: The rate of every branch.
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

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        keep: Tensor | None = None,
        weights: CellWeights | None = None,
    ) -> Tensor:
        """Return the next feature.

        Args:
            s0: The older map of the pair, (B, H, W, C).
            s1: The newer one.
            keep: Drop path factors of all branches, (2 * stacks, B, 1, 1, 1), if the stage drew
                them for all of its cells; by default the cell draws its own.
            weights: For the kernels, likewise from the stage.
        """
        if weights is not None and not dispatch.kernels_allowed():
            weights = None
        stream = None if weights is None else self._stream(s0, s1)
        x, by_kernel = self._start(s0, s1, weights, stream)
        if keep is None:
            (keep,) = draw_keeps([self], x)
        keeps = [None] * len(self.stacks) if keep is None else keep.to(x.dtype).split(2)
        overwritten = by_kernel and x.device.type == 'cpu' and not torch.is_grad_enabled()
        # On CPUs, inference takes 96% of the time if all kernels write into one map (C-S and A-S at
        # 512x512, two cores).
        out = x if overwritten and self._is_unseen() else None
        if weights is not None:
            for stack, kept, ready in zip(self.stacks, keeps, weights.stacks):
                x = stack(x, (None, None), kept, out, ready, stream)
            return x
        for stack, gates, kept in zip(self.stacks, self._gates(), keeps):
            x = stack(x, gates, kept, out)
        return x

    def _start(
        self, s0: Tensor, s1: Tensor, ready: CellWeights | None, stream: NarrowStream | None
    ) -> tuple[Tensor, bool]:
        """Return ``LN(a0 * s0 + a1 * s1)``, and whether a kernel computed it."""
        if ready is not None:
            narrow = None if stream is None else stream.room(s1)
            a0, a1, weight = ready.norm
            x = ops.norm_of_pair(s0, s1, a0, a1, weight, narrow)
            if stream is not None:
                stream.put(x, narrow)
            return x, True
        weights = kernel_weights(self, {'norm': LayerNorm})
        if weights is None or weights[0] is None:
            return self.norm(self.scale0 * s0 + self.scale1 * s1), False
        return ops.norm_of_pair(s0, s1, self.scale0, self.scale1, weights[0]), True

    def _stream(self, s0: Tensor, s1: Tensor) -> NarrowStream | None:
        """Return what passes narrow copies from kernel to kernel, if that is useful."""
        dtype = torch.promote_types(s1.dtype, self.scale0.dtype)
        readers = [b.reads_narrow for stack in self.stacks for b in (stack.mixer, stack.mlp)]
        stream = narrow_stream(s1, dtype, readers)
        return stream if stream is not None and self._is_unseen() else None

    def _is_unseen(self) -> bool:
        """Return whether no hook sees the maps between branches, so that these may be overwritten.

        A hook might also change them itself.
        """
        return not (
            is_observed(self)
            or any(
                is_observed(stack) or is_observed(stack.mixer) or is_observed(stack.mlp)
                for stack in self.stacks
            )
        )

    def _gates(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return sigmoid(lam) of every stack's branches; None for those that were fused."""
        if self.gate_logits is None:
            return [(None, None)] * len(self.stacks)
        gates = self.gate_logits.sigmoid().unbind()
        return [(gates[mixer], gates[mlp]) for mixer, mlp in self._gate_indices]

    def stock_weights(self) -> list[Sequence[Tensor | None]] | None:
        """Return the tensors that weights are made from: of the cell itself, and of every branch.

        None if kernels cannot stand in for all parts, or a hook may change them before they are
        used.
        """
        if type(self) is not Cell or not calls_its_own_forward(self):
            return None
        norm = kernel_weights(self, {'norm': LayerNorm})
        if norm is None or norm[0] is None:
            return None
        found: list[Sequence[Tensor | None]] = [(self.scale0, self.scale1, *norm, self.gate_logits)]
        for stack in self.stacks:
            if type(stack) is not Stack or not calls_its_own_forward(stack):
                return None
            for branch in (stack.mixer, stack.mlp):
                weights = branch.stock_weights() if calls_its_own_forward(branch) else None
                if weights is None:
                    return None
                found.append((*weights, branch.logit_of_scale()))
        return found

    def gate_places(self) -> list[tuple[int, int]]:
        """Return the indices into lam of every stack's mixer and PolyMLP."""
        return self._gate_indices

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


def draw_keeps(cells: Sequence[Cell], x: Tensor) -> list[Tensor | None]:
    """Draw the drop path (stochastic depth) factors for all branches of cells.

    A branch is dropped for whole samples, and scaled up for the others.

    Args:
        cells: The cells of one stage.
        x: A map of that stage, (B, H, W, C).

    Returns:
        For every cell (2 * stacks, B, 1, 1, 1), or None for 1.
    """
    drawn = [cell for cell in cells if cell.training and cell.drop_path_rate > 0]
    if not drawn:
        return [None] * len(cells)
    counts = [2 * len(cell.stacks) for cell in drawn]
    rates = [1 - cell.drop_path_rate for cell in drawn]
    keeps = torch.rand(sum(counts), len(x), 1, 1, 1, dtype=wide_dtype(x), device=x.device)
    of_cells = keeps.split(counts)
    torch._foreach_add_(of_cells, rates)  # at least 1 with the rate as probability
    keeps.floor_()
    torch._foreach_div_(of_cells, [rate or 1.0 for rate in rates])
    found = iter(of_cells)
    return [next(found) if cell in drawn else None for cell in cells]


class Downsample(nn.Module):
    """Halve the resolution of (B, H, W, C), rounding up, and change its width.

    Args:
        kind: 'sep3x3', a depthwise 3x3 convolution and a 1x1, or 'full3x3', a dense 3x3.
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
        self._weights = StageWeights()

    def train(self, mode: bool = True) -> Stage:
        self._weights.forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._weights.forget()
        return super()._apply(fn, recurse)

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
        keeps = draw_keeps(self.cells, s1)
        weights = self._weights.of(self.cells, s1, keep=not self.training)
        for cell, *arguments in zip(self.cells, keeps, weights):
            while arguments and arguments[-1] is None:
                arguments.pop()
            s0, s1 = s1, self._clipped(self._call(cell, s0, s1, *arguments), loss_scale)
        return s0, s1

    def _call(self, cell: Cell, *arguments: Any) -> Tensor:
        if not (self.with_cp and torch.is_grad_enabled()):
            return cell(*arguments)
        if not (isinstance(cell.norm, PositionNorm) or dispatch.plain_wanted()):
            return checkpoint(cell, *arguments, use_reentrant=False)
        contexts = dispatch.checkpoint_contexts  # only when needed: compilers cannot trace them
        return checkpoint(cell, *arguments, use_reentrant=False, context_fn=contexts)

    def _clipped(self, x: Tensor, loss_scale: float | Tensor) -> Tensor:
        if self.grad_clip_norm is None or not x.requires_grad or dispatch.exporting():
            return x
        return ops.clip_gradient(x, self.grad_clip_norm, loss_scale)
