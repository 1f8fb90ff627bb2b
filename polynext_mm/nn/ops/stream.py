"""The residual stream in half precision, from one kernel to the next.

Under autocast the stream is wide, but a branch's products need it narrow. The kernel that ends a
branch writes both, so that the cast takes no extra pass over the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .precision import matmul_dtype

residual_triton = dispatch.triton_module('residual_triton')


class NarrowStream:
    """Passes the narrow copy of a map to the branch that is called with the map.

    Args:
        dtype: Of the copies.
        readers: Whether each of the following branches, in order, reads a narrow copy.
    """

    def __init__(self, dtype: torch.dtype, readers: Sequence[bool]):
        self.dtype = dtype
        self._readers = iter(readers)
        self._map: Tensor | None = None
        self._copy: Tensor | None = None

    def room(self, x: Tensor) -> Tensor | None:
        """Allocate the copy of a map like ``x``, if the next branch reads it."""
        if not next(self._readers, False):
            return None
        return torch.empty_like(x, dtype=self.dtype, memory_format=torch.contiguous_format)

    def put(self, x: Tensor, copy: Tensor | None) -> None:
        self._map, self._copy = x, copy

    def take(self, x: Tensor) -> Tensor | None:
        """Return the copy of ``x``; None if there is none, or it is that of another map."""
        copy = self._copy if self._map is x else None
        self._map = self._copy = None
        return copy


def narrow_stream(like: Tensor, dtype: torch.dtype, readers: Sequence[bool]) -> NarrowStream | None:
    """Return a stream for maps of a dtype; None if they are narrow, or no kernel writes copies.

    Args:
        like: A map on the device.
        dtype: Of the residual stream.
        readers: As for :class:`NarrowStream`.
    """
    narrow = matmul_dtype(like)
    if narrow is dtype or not dispatch.triton_wanted(residual_triton):
        return None
    takes = residual_triton.triton_operators.takes_like(like)
    return NarrowStream(narrow, readers) if takes else None


def run_branch(
    kernel: type[dispatch.Kernel],
    x: Tensor,
    *args,
    weights: Sequence[Tensor | None],
    out: Tensor | None,
    stream: NarrowStream | None,
) -> Tensor:
    """Compute a branch with its kernel, given x, its narrow copy and memory for that of the sum.

    Args:
        kernel: The kernel.
        x: The residual stream.
        args: The arguments after these three.
        weights: As for :func:`~polynext_mm.nn.ops.dispatch.run_kernel`.
        out: Likewise.
        stream: Where the copies come from and go to, or None.
    """
    copy, room = (None, None) if stream is None else (stream.take(x), stream.room(x))
    y = dispatch.run_kernel(kernel, x, copy, room, *args, weights=weights, out=out)
    if stream is not None:
        stream.put(y, room)
    return y
