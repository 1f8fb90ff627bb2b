"""Building blocks of kernels: blocks and bands of maps, sums in place.

On a CPU a kernel processes a map in parts small enough that its intermediates stay in cache. Maps
are (B, H, W, C); a block of positions is (positions, C). ``keep`` is the drop path factor of a
branch, (B, 1, 1, 1), or None for 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import dispatch
from .precision import wide

residual_triton = dispatch.triton_module('residual_triton')

# Elements of the widest map in a part: 2 MiB in float32.
CPU_BLOCK = 1 << 19


def blocks(
    width: int, keep: Tensor | None, first: Tensor, *others: Tensor | None
) -> Iterator[tuple[Tensor | None, ...]]:
    """Cut maps (positions, C) into blocks of positions, for operations on single positions.

    On devices other than CPUs there is one block.

    Args:
        width: Channels of the widest intermediate.
        keep: The drop path factor, or None for 1.
        first: The first map.
        others: More maps of the same positions, or None.

    Yields:
        The factor and the maps. The factor is (B, 1, 1) for one block, else (positions, 1).
    """
    maps, count = (first, *others), len(first)
    size = max(1, CPU_BLOCK // width)
    if count <= size or first.device.type != 'cpu':
        yield None if keep is None else keep.flatten(2), *maps
        return
    if keep is not None:
        keep = keep.flatten(1).repeat_interleave(count // len(keep), 0)
    for start in range(0, count, size):
        block = slice(start, start + size)
        yield (
            None if keep is None else keep[block],
            *(None if m is None else m[block] for m in maps),
        )


def bands(width: int, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a map (B, H, W, C) into bands of rows, for operations on neighbourhoods.

    Bands overlap by the operation's reach, so a map not much larger than a block stays whole, as it
    does on devices other than CPUs. In bands, inference with CPolyNeXt-S at 512x512 takes 86% of
    the time (two cores, median of 12 interleaved runs).

    Args:
        width: Channels of the widest intermediate.
        x: The map.

    Yields:
        The samples and the rows of each band.
    """
    batch, height, columns, _ = x.shape
    if batch * height * columns * width <= 2 * CPU_BLOCK or x.device.type != 'cpu':
        yield slice(0, batch), slice(0, height)
        return
    count = math.ceil(height * columns * width / CPU_BLOCK)
    rows = max(16, math.ceil(height / count))
    for sample in range(batch):
        for start in range(0, height, rows):
            yield slice(sample, sample + 1), slice(start, min(start + rows, height))


def positions(x: Tensor | None) -> Tensor | None:
    """View (B, H, W, C) as (positions, C); None stays None."""
    return None if x is None else x.view(-1, x.shape[-1])


def scaled(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``x * keep``."""
    return x if keep is None else x * keep


def narrowed(grad: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``grad * keep`` in another dtype, in one pass."""
    if keep is None:
        return grad.to(dtype)
    product = torch.empty_like(grad, dtype=dtype)
    torch.mul(_like(keep, grad), keep, out=_like(keep, product))
    return product


def add_branch(
    x: Tensor,
    branch: Tensor,
    keep: Tensor | None,
    out: Tensor,
    narrow: Tensor | None = None,
) -> None:
    """Compute ``out = x + keep * branch``, and copy it to ``narrow``."""
    if narrow is not None:
        if dispatch.by_triton(residual_triton, x, branch, keep, out, narrow):
            residual_triton.add_branch(x, branch, keep, out, narrow)
            return
        add_branch(x, branch, keep, out)
        narrow.copy_(out)
    elif keep is None:
        torch.add(x, branch, out=out)
    else:
        x, branch, out = (_like(keep, t) for t in (x, branch, out))
        torch.addcmul(x, branch, keep, out=out)


def _like(keep: Tensor, x: Tensor) -> Tensor:
    """View (positions, C) as (B, positions / B, C), if there is one factor per sample."""
    return x.view(len(keep), -1, x.shape[-1]) if keep.ndim == 3 and x.ndim == 2 else x


# Matrix products below pass ``out``, since FlopCounterMode does not count in-place variants.


def add_product(
    x: Tensor,
    y: Tensor,
    matrix: Tensor,
    keep: Tensor | None,
    out: Tensor,
    narrow: Tensor | None = None,
) -> None:
    """Compute ``out = x + keep * y matrix``, and copy it to ``narrow``.

    ``x`` and ``out`` may be wider than ``y``.
    """
    if keep is None and x.dtype == y.dtype and narrow is None:
        torch.addmm(x, y, matrix, out=out)
    else:
        add_branch(x, y @ matrix, keep, out, narrow)


# Gradients are summed over blocks. They start as None, so a GPU's single block needs no addition.


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return ``total + part``, written into total."""
    return part if total is None or part is None else total.add_(part)


def added_outer(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """Return ``total + grad^T x``, written into total; on CPUs the sum is wide."""
    if total is None:
        outer = grad.t() @ x
        return wide(outer) if x.device.type == 'cpu' else outer
    if total.dtype == grad.dtype:
        return torch.addmm(total, grad.t(), x, out=total)
    return total.add_(grad.t() @ x)


def joined(parts: list[Tensor]) -> Tensor:
    """Concatenate what the blocks yielded."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
