"""Prepare the weights of all cells of a stage for their kernels at once.

There is one autograd function per stage rather than per network: its gradients are complete when
the stage's are, so that processes can exchange them while backward continues.

If no gradient is needed, prepared weights are cached until a weight changes. Detected changes are
another tensor or other memory in its place, and every torch operation except those on
``weight.data``; ``train()``, ``eval()``, and moving or casting a module always clear the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .layers import LayerNorm, made_ready, wanted_by
from .ops import dispatch
from .ops.precision import Like, matmul_dtype
from .ops.ready import Wanted

if TYPE_CHECKING:
    from .cell import Cell

#: Of one branch, in the order of its kernel.
BranchWeights = Sequence['Tensor | None']


class CellWeights(NamedTuple):
    """Weights of a cell, ready for its kernels.

    Args:
        norm: scale0, scale1 and the norm's weight.
        stacks: Those of the mixer and of the PolyMLP of every stack.
    """

    norm: Sequence[Tensor]
    stacks: tuple[tuple[BranchWeights, BranchWeights], ...]


class StageWeights:
    """Prepares the weights of a stage, and caches them where possible."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any, list[CellWeights | None]] | None = None

    def __getstate__(self) -> dict:
        return {'_kept': None}  # a copy has its own weights

    def forget(self) -> None:
        self._kept = None

    def of(self, cells: Sequence[Cell], x: Tensor, keep: bool) -> list[CellWeights | None]:
        """Return the weights of all cells; None for a cell that must prepare its own.

        Args:
            cells: Of the stage.
            x: The map that the stage begins with.
            keep: Whether to cache them, if no gradient is needed.
        """
        if not dispatch.kernels_allowed():
            return [None] * len(cells)
        found = [cell.stock_weights() for cell in cells]
        if not keep or torch.is_grad_enabled() or _captured(x):
            return _made(cells, found, x)
        tensors = [t for raw in found if raw for row in raw for t in row if t is not None]
        if any(type(t) is FakeTensor or t.is_inference() for t in tensors):
            return _made(cells, found, x)
        key: list[Any] = [(id(t), t._version, t.data_ptr()) for t in tensors]
        key += [id(raw) if raw is None else len(raw) for raw in found]
        key += [x.dtype, matmul_dtype(x), dispatch.triton_choice()]
        if self._kept is None or self._kept[0] != key:
            # keep the tensors alive, so that no other tensor reuses one's id
            self._kept = key, tensors, _made(cells, found, x)
        return self._kept[2]


def _captured(x: Tensor) -> bool:
    """Return whether a CUDA graph is being recorded, which must prepare weights in every replay."""
    initialized = x.device.type == 'cuda' and torch.cuda.is_initialized()
    return initialized and torch.cuda.is_current_stream_capturing()


def _made(
    cells: Sequence[Cell], found: list[list[Sequence[Tensor | None]] | None], x: Tensor
) -> list[CellWeights | None]:
    present = [(cell, raw) for cell, raw in zip(cells, found) if raw is not None]
    if not present:
        return [None] * len(cells)
    # all sigmoids at once: the gates of every cell, split singly, and every attention's scales
    logits = [logit for _, raw in present for *_, logit in raw if logit is not None]
    sizes: list[int] = []
    for _, raw in present:
        for i, (*_, logit) in enumerate(raw):
            if logit is not None:
                sizes += [len(logit)] if i else [1] * len(logit)
    factors = iter(torch.cat(logits).sigmoid().split(sizes) if logits else ())
    wanted: list[Wanted | None] = []
    for cell, raw in present:
        (*vectors, logit), *branches = raw
        dtype = torch.promote_types(x.dtype, cell.scale0.dtype)  # the residual stream's
        like = Like(x.device, dtype, x.shape)
        gates = None if logit is None else [next(factors) for _ in logit]
        wanted += [wanted_by(LayerNorm, like, v) for v in vectors if v is not None]
        for i, (stack, places) in enumerate(zip(cell.stacks, cell.gate_places())):
            for j, branch in enumerate((stack.mixer, stack.mlp)):
                *weights, logit = branches[2 * i + j]
                gate = None if gates is None else gates[places[j]]
                scale = None if logit is None else next(factors)
                wanted += branch.wanted(weights, like, gate, scale)
    made = iter(made_ready(wanted))
    return [None if raw is None else _taken(made, raw) for raw in found]


def _taken(made, raw) -> CellWeights:
    norm, *branches = [[next(made) for _ in row[:-1]] for row in raw]
    return CellWeights(norm, tuple(zip(branches[::2], branches[1::2])))
