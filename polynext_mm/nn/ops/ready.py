"""Prepare weights for kernels, many at once: scaled, narrowed, laid out.

The weight that a kernel needs differs a little from the parameter: a gate is folded in, it is in
the dtype of the products, the taps of a dilated convolution come first. For one branch that takes a
dozen launches in both directions, so it is done for all branches of a stage together
(:mod:`polynext_mm.nn.stage_weights`), by one autograd function, which launches about as many
kernels as one branch would.

A weight whose gradient is a sum over a map may be handed out in *copies*, (copies, *shape): an
expanded view with one for every program of a kernel. The gradient of a copy is its program's
partial sum, and the partial sums are added up here, for all weights of a shape at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch

T = TypeVar('T', Tensor, 'Tensor | None')


class Wanted(NamedTuple):
    """A weight, and the form in which a kernel needs it.

    Args:
        weight: The parameter.
        dtype: The dtype in which it is needed.
        factor: (parts,), for as many equal parts of the weight's first dimension; None for 1.
        taps_first: Lay (C, 1, S, S) out as (S, S, C) in memory.
        copies: How many are handed out, or 0 for the weight itself.
    """

    weight: Tensor
    dtype: torch.dtype
    factor: Tensor | None = None
    taps_first: bool = False
    copies: int = 0

    def is_ready(self) -> bool:
        return (
            self.factor is None
            and self.weight.dtype is self.dtype
            and not (self.taps_first or self.copies)
        )


def ready(wanted: Sequence[Wanted]) -> list[Tensor]:
    """Return the prepared weights; the parameter itself if it needs no preparation."""
    made = [w.weight.contiguous() for w in wanted]
    groups: dict[tuple, list[int]] = {}
    for i, w in enumerate(wanted):
        if not w.is_ready():
            parts = 0 if w.factor is None else len(w.factor)
            key = w.weight.shape, w.weight.dtype, w.dtype, parts, w.taps_first, w.copies
            groups.setdefault(key, []).append(i)
    if not groups:
        return made
    columns, tensors = [], []
    for (_, _, dtype, parts, taps_first, copies), places in groups.items():
        columns.append(_Column(len(places), dtype, parts, taps_first, copies))
        tensors += [made[i] for i in places]
        if parts:
            tensors += [factor for i in places if (factor := wanted[i].factor) is not None]
    found = iter(dispatch.run_kernel(_Ready, columns, weights=tensors))
    for places in groups.values():
        for i in places:
            made[i] = next(found)
    return made


def one(weight: T, dimensions: int) -> T:
    """Return a weight that has this many dimensions, or one of its copies."""
    return weight[0] if weight is not None and weight.ndim > dimensions else weight


def grad_of(weight: Tensor | None, sums: Tensor) -> Any:
    """Return the gradient of a weight, or of its copies, from sums over parts of a map.

    Args:
        weight: As the kernel got it.
        sums: (parts, *shape).
    """
    if weight is None or sums.shape == weight.shape:  # each copy has its own
        return None if weight is None else sums
    total = (sums[0] if len(sums) == 1 else sums.sum(0)).to(weight.dtype)
    if total.shape == weight.shape:
        return total
    return torch.cat((total[None], total.new_zeros(len(weight) - 1, *total.shape)))


class _Column(NamedTuple):
    """Weights of the same shape that need the same preparation."""

    size: int
    dtype: torch.dtype
    parts: int
    taps_first: bool
    copies: int


def _taken(columns: list[_Column], tensors: Sequence) -> Iterator[tuple]:
    """Yield every column with its weights and its factors."""
    start = 0
    for column in columns:
        end = start + column.size
        last = end + column.size if column.parts else end
        yield column, tensors[start:end], tensors[end:last]
        start = last


class _Ready(dispatch.Kernel):
    @staticmethod
    def infer(columns, *tensors):
        return _Ready._made(columns, tensors)[0]

    @staticmethod
    def _made(columns, tensors):
        """Return the weights, and what backward needs."""
        made, scaled, sources, targets = [], [], [], []
        for column, weights, factors in _taken(columns, tensors):
            if column.parts:
                stacked, scale = torch.stack(weights), torch.stack(factors)
                target = torch.empty_like(stacked, dtype=column.dtype)
                scaled += stacked, scale
                torch.mul(_parts(stacked, column), scale[..., None], out=_parts(target, column))
                rows = target.unbind()
            elif column.taps_first:
                taps = torch.stack(weights).flatten(2).transpose(1, 2)
                taps = taps.to(column.dtype, memory_format=torch.contiguous_format)
                taps = taps.contiguous().transpose(1, 2).unbind()
                rows = [t.view(weights[0].shape) for t in taps]
            elif weights[0].dtype is column.dtype:
                rows = [weight.detach() for weight in weights]
            else:
                rows = [torch.empty_like(weight, dtype=column.dtype) for weight in weights]
                sources, targets = [*sources, *weights], [*targets, *rows]
            if column.copies:
                rows = [row.expand(column.copies, *row.shape) for row in rows]
            made += rows
        if targets:
            torch._foreach_copy_(targets, sources)
        return tuple(made), scaled

    @staticmethod
    def forward(ctx, columns, *tensors):
        made, scaled = _Ready._made(columns, tensors)
        ctx.columns, ctx.dtypes = columns, [t.dtype for t in tensors]
        ctx.save_for_backward(*scaled)
        ctx.set_materialize_grads(False)
        needed = []
        for _, weights, factors in _taken(columns, ctx.needs_input_grad[1:]):
            needed += [any(pair) for pair in zip(weights, factors or weights)]
        ctx.mark_non_differentiable(*(t for t, need in zip(made, needed) if not need))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        scaled = iter(ctx.saved_tensors)
        columns, start = [], 0
        for column in ctx.columns:
            columns.append(_without_gaps(grads[start : start + column.size]))
            start += column.size
        _sum_copies(ctx.columns, columns)
        found, sources, targets = [], [], []
        for (column, dtypes, factors), rows in zip(_taken(ctx.columns, ctx.dtypes), columns):
            stacked, scale = (next(scaled), next(scaled)) if column.parts else (None, None)
            if rows is None:
                found += [None] * (len(dtypes) + len(factors))
            elif column.parts:
                grad = _parts(rows if isinstance(rows, Tensor) else torch.stack(rows), column)
                of_weights = (grad * scale[..., None]).to(dtypes[0])
                of_factors = (grad * _parts(stacked, column)).sum(-1).to(factors[0])
                found += [*of_weights.view_as(stacked).unbind(), *of_factors.unbind()]
            elif column.copies:
                found += rows.to(dtypes[0]).unbind()
            else:
                # contiguous: a gradient with other strides than its weight would be copied again
                made = [
                    torch.empty_like(row, dtype=dtype, memory_format=torch.contiguous_format)
                    for row, dtype in zip(rows, dtypes)
                ]
                sources, targets = [*sources, *rows], [*targets, *made]
                found += made
        if targets:
            torch._foreach_copy_(targets, sources)
        return None, *found


def _parts(stacked: Tensor, column: _Column) -> Tensor:
    """View (weights, *shape) as (weights, parts, elements)."""
    return stacked.view(column.size, column.parts, -1)


def _without_gaps(grads: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
    """Return gradients, with zeros for those that did not arrive; None if none did."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return None
    return [torch.zeros_like(like) if grad is None else grad for grad in grads]


def _sum_copies(columns: list[_Column], grads: list) -> None:
    """Replace the copies' gradients by the weights' own, stacked, for all of a shape at once."""
    groups: dict[tuple, list[int]] = {}
    for i, (column, rows) in enumerate(zip(columns, grads)):
        if column.copies and rows is not None:
            groups.setdefault((rows[0].shape, rows[0].dtype), []).append(i)
    for places in groups.values():
        sums = torch.stack([row for i in places for row in grads[i]]).sum(1)
        for i, rows in zip(places, sums.split([columns[i].size for i in places])):
            grads[i] = rows
