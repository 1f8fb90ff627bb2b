"""What kernels are made of: blocks and bands of maps, norms with their moments, sums in place.

On a CPU a kernel takes a map in parts small enough that its intermediates stay in cache. Maps are
(B, H, W, C); a block of positions is (positions, C). ``keep`` is the factor of drop path on a
branch, (B, 1, 1, 1), or None for 1.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import LN_EPS, wide

# Elements of the widest map of a part: 2 MiB in float32.
CPU_BLOCK = 1 << 19


def blocks(width: int, *maps: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Cut maps (positions, C) into blocks of positions, for operations on single positions.

    On devices other than CPUs there is one block.

    Args:
        width: Channels of the widest intermediate.
        maps: The maps, all of the same positions; None stays None.
    """
    positions = maps[0].shape[0]
    size = max(1, CPU_BLOCK // width)
    if positions <= size or maps[0].device.type != 'cpu':
        yield maps
        return
    for start in range(0, positions, size):
        yield tuple(None if m is None else m[start : start + size] for m in maps)


def bands(width: int, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a map (B, H, W, C) into bands of rows, for operations on neighbourhoods.

    Bands overlap by what the operation looks at, so a map not much larger than a block stays whole,
    as it does on devices other than CPUs. In bands, CPolyNeXt-S takes .86 of the time in inference
    at 512x512 (two cores, median of 12 interleaved runs).

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


def positions(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (positions, C)."""
    return x.view(-1, x.shape[-1])


def keep_at_positions(keep: Tensor | None, x: Tensor) -> Tensor | None:
    """Expand (B, 1, 1, 1) to the positions of ``x``, as (positions, 1)."""
    return None if keep is None else keep.expand(*x.shape[:3], 1).reshape(-1, 1)


def scaled(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``x * keep``."""
    return x if keep is None else x * keep


def zeros_like(*weights: Tensor | None) -> list[Tensor | None]:
    """Return accumulators for the gradients of ``weights``."""
    return [None if w is None else torch.zeros_like(w) for w in weights]


# Matrix products below pass ``out``: FlopCounterMode counts those, and not the in-place variants.


def add_product(x: Tensor, y: Tensor, matrix: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """Compute ``out = x + keep * y matrix``; ``x`` and ``out`` may be wider than ``y``."""
    if keep is None and x.dtype == y.dtype:
        torch.addmm(x, y, matrix, out=out)
    else:
        torch.add(x, scaled(y @ matrix, keep), out=out)


def add_outer_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Compute ``total += grad^T x``; ``total`` may be wider."""
    if total.dtype == grad.dtype:
        torch.addmm(total, grad.t(), x, out=total)
    else:
        total.add_(grad.t() @ x)


def norm_forward(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LN of ``x`` over its last dimension, its means and reciprocal deviations."""
    weight = None if weight is None else wide(weight)
    return torch.native_layer_norm(wide(x), x.shape[-1:], weight, None, LN_EPS)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Return the gradient of an LN's input; that of its weight is added to ``grad_weight``."""
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
