"""The two sums of polynomial attention in blocks of scores, for every query i::

    a_ij  = (1 + q_i . k_j)^4
    out_i = sum_j a_ij v_j
    sum_i = sum_j a_ij

Blocks are computed, used and discarded, and recomputed in backward: memory is linear in the number
of tokens. These are pieces of kernels: autograd does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import wide, wide_dtype

EPS = 1e-12  # the smallest divisor, as in the authors' release

# Elements of the block of scores held at a time. On a CPU this is per thread: half a MiB in
# float32, and two of them in backward, so that a thread's share stays in its private cache. On a
# GPU it is the total, enough to fill the device.
THREAD_BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 26

# Devices on which half-precision inputs are multiplied in float32: a block of half scores would be
# converted back and forth, which takes a CPU longer than the products.
WIDE_DEVICES = ('cpu',)


def sums(q: Tensor, k: Tensor, v: Tensor, undivided: bool = False) -> tuple[Tensor, Tensor]:
    """Return the sums of values, (heads, queries, C), and of weights, (heads, queries, 1).

    Args:
        q: (heads, queries, C). Like the others, it may have any strides but the last.
        k: (heads, keys, C).
        v: (heads, keys, C). The sums are float32, or float64 if these are.
        undivided: Whether to undo the scaling of float16 inputs: both sums are divided by the
            fourth power of the query's largest score, which cancels in their quotient.
    """
    q, k, v = map(_multiplied, (q, k, v))
    cut = _Cut(q, k.shape[1])
    memory = cut.memory(q)
    out, total = (cut.empty(width, q, wide_dtype(q)) for width in (v.shape[-1], 1))
    q = cut.padded(_with_column(q, q.new_ones(1)))
    for *queries, k_g, v_g in cut.groups(q, out, total, _transposed_with_ones(k), v):
        k_g, v_g = cut.shared(k_g, v_g)
        for q_b, out_b, total_b in cut.blocks(*queries):
            a, top = _scores(q_b, k_g, memory)
            a.mul_(a).mul_(a)
            torch.sum(a, -1, keepdim=True, out=total_b)
            _write_product(a.to(v.dtype), v_g, out_b)
            if top is not None and undivided:
                for x in (out_b, total_b):
                    x.mul_(top**4)
    return cut.trimmed(out), cut.trimmed(total)


def sums_backward(
    grad: Tensor, grad_total: Tensor, q: Tensor, k: Tensor, v: Tensor, undivided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous.

    Args:
        grad: Of the sum of values, (heads, queries, C), not in half precision.
        grad_total: Of the sum of weights, (heads, queries, 1), not in half precision.
        q: As in :func:`sums`.
        k: As in :func:`sums`.
        v: As in :func:`sums`.
        undivided: As in :func:`sums`.
    """
    dtypes = q.dtype, k.dtype, v.dtype
    q, k, v = map(_multiplied, (q, k, v))
    cut = _Cut(q, k.shape[1])
    of_scores, of_slope = cut.memory(q), cut.memory(v)
    grad_q = cut.empty(q.shape[-1], q, q.dtype)
    sum_k, sum_v = _SumOverQueries(cut, k), _SumOverQueries(cut, v)
    # The derivative with respect to a score r_ij is 4 r_ij^3 (grad_i . v_j + grad_total_i).
    steep, bias = (4 * grad).to(v.dtype), 4 * grad_total
    q_and_1, steep_and_bias = _with_column(q, q.new_ones(1)), _with_column(steep, bias)
    of_queries = map(cut.padded, (q_and_1, q, steep_and_bias, bias, grad.to(v.dtype)))
    of_keys = (_transposed_with_ones(k), _transposed_with_ones(v), k)
    for *queries, k_t, v_t, k_g, grad_k_g, grad_v_g in cut.groups(
        *of_queries, grad_q, *of_keys, sum_k.of_all, sum_v.of_all
    ):
        k_t, v_t, k_g = cut.shared(k_t, v_t, k_g)
        sum_k.start(grad_k_g)
        sum_v.start(grad_v_g)
        for q_and_1_b, q_b, steep_b, bias_b, grad_b, grad_q_b in cut.blocks(*queries):
            r, top = _scores(q_and_1_b, k_t, of_scores)
            slope = _product_plus(steep_b, v_t, bias_b, of_slope)
            if top is not None:
                slope.mul_(top**3 if undivided else 1 / top)
            slope.mul_(r)
            square = r.mul_(r)
            slope = slope.mul_(square).to(q.dtype)
            _write_product(slope, k_g, grad_q_b)
            sum_k.add(slope, q_b)
            a = square.mul_(square)
            if top is not None and undivided:
                a.mul_(top**4)
            sum_v.add(a.to(v.dtype), grad_b)
        sum_k.finish()
        sum_v.finish()
    of_q, of_k, of_v = dtypes
    return cut.trimmed(grad_q).to(of_q), sum_k.of_all.to(of_k), sum_v.of_all.to(of_v)


def _multiplied(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of the products of scores."""
    return wide(x) if x.device.type in WIDE_DEVICES else x


class _Cut:
    """The division of the scores of all heads into blocks.

    Heads come in groups: either several whole heads, which are one block, or a single head, whose
    queries make several blocks. Those blocks are divided into parts, one for each thread of a CPU,
    so that a thread finds what it wrote in its own cache. Either way a block is a batch of
    matrices, one per head or part.

    Args:
        q: The queries, (heads, tokens, C).
        keys: The number of keys.
    """

    def __init__(self, q: Tensor, keys: int):
        heads, self.tokens, self.keys = len(q), q.shape[1], keys
        on_cpu = q.device.type == 'cpu'
        threads = torch.get_num_threads() if on_cpu else 1
        budget = threads * THREAD_BLOCK if on_cpu else DEVICE_BLOCK
        fitting = budget // (self.tokens * keys)
        self.whole = fitting >= threads
        if self.whole:
            groups = max(1, math.ceil(heads / fitting))
            self.heads = math.ceil(heads / groups)
            self.parts, self.rows, count = 1, self.tokens, 1
        else:
            self.heads, self.parts = 1, threads
            count = math.ceil(self.tokens * keys / budget)
            self.rows = math.ceil(self.tokens / (count * threads))
        self.padding = count * self.parts * self.rows - self.tokens

    def padded(self, x: Tensor) -> Tensor:
        """Append rows of zeros to (heads, tokens, C), so that all parts have the same number."""
        return F.pad(x, (0, 0, 0, self.padding)) if self.padding else x

    def empty(self, width: int, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for (heads, tokens, width), padded, on the device of the queries."""
        return q.new_empty(len(q), self.tokens + self.padding, width, dtype=dtype)

    def trimmed(self, x: Tensor) -> Tensor:
        """Return the rows of :meth:`padded` that are not padding."""
        return x[:, : self.tokens].contiguous() if self.padding else x

    def memory(self, x: Tensor) -> Tensor:
        """Return memory for a block of scores in the dtype of x, shared by all blocks.

        Newly allocated memory would cost page faults.
        """
        return x.new_empty(max(self.heads, self.parts), self.rows, self.keys)

    def groups(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield what belongs to the heads of each group."""
        return zip(*(t.split(self.heads) for t in tensors)) if len(tensors[0]) else iter(())

    def blocks(self, *queries: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield what belongs to the queries of each block, (batch, rows, C), of a group."""
        if self.whole:
            return iter((queries,))
        return zip(*(t.view(-1, self.parts, self.rows, t.shape[-1]).unbind() for t in queries))

    def shared(self, *keys: Tensor) -> tuple[Tensor, ...]:
        """Expand what belongs to the keys of a group to the batch of its blocks."""
        return keys if self.whole else tuple(t.expand(self.parts, -1, -1) for t in keys)


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """Append a column for :func:`_product_plus` to (heads, tokens, C), except in half precision."""
    if x.dtype != wide_dtype(x):
        return x
    return torch.cat((x, column.expand(*x.shape[:2], 1)), -1)


def _transposed_with_ones(x: Tensor) -> Tensor:
    """Append ones to (heads, keys, C), except in half precision, and return the transpose."""
    x = x.transpose(1, 2)
    return F.pad(x, (0, 0, 0, 1), value=1.0) if x.dtype == wide_dtype(x) else x


def _product_plus(a: Tensor, b: Tensor, bias: Tensor | float, memory: Tensor) -> Tensor:
    """Return ``a b + bias`` in float32 or wider, for a bias per row.

    If possible, the bias is one more column of a (:func:`_with_column`), which saves a pass over
    the block. In half precision that would round the sum, so it is added to the wider product.

    Args:
        a: (batch, queries, C), from :func:`_with_column`.
        b: (batch, C, keys), from :func:`_transposed_with_ones`.
        bias: A number or (batch, queries, 1).
        memory: For the product, from :meth:`_Cut.memory`.
    """
    product = torch.bmm(a, b, out=memory[: len(a)])
    return product if a.dtype == wide_dtype(a) else wide(product).add_(bias)


def _scores(q: Tensor, k: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``1 + q k`` of a block, float32 or wider, and the divisors of its rows, if any.

    For float16 that is a row's largest magnitude, which keeps the powers within the dtype's range
    and cancels in the quotient.
    """
    r = _product_plus(q, k, 1.0, memory)
    if q.dtype is not torch.float16:
        return r, None
    top = r.abs().amax(-1, keepdim=True).clamp_min_(EPS)
    return r.div_(top), top


class _SumOverQueries:
    """The gradient of keys or values, summed over the blocks of a group in a wide dtype.

    Args:
        cut: The blocks.
        x: The keys or values of all heads.
    """

    def __init__(self, cut: _Cut, x: Tensor):
        dtype = wide_dtype(x)
        self.of_all = x.new_empty(x.shape, dtype=dtype)
        # A single block of whole heads is itself the sum.
        self.of_parts = None if cut.whole else x.new_empty(cut.parts, *x.shape[1:], dtype=dtype)

    def start(self, of_group: Tensor) -> None:
        """Begin a group; ``of_group`` is its part of ``of_all``."""
        self.of_group, self.is_empty = of_group, True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add ``a^T b`` of a block: a is (batch, queries, keys), b is (batch, queries, C)."""
        total = self.of_group if self.of_parts is None else self.of_parts
        a = a.transpose(1, 2)
        if self.is_empty:
            _write_product(a, b, total)
        elif total.dtype == a.dtype:
            torch.baddbmm(total, a, b, out=total)
        else:
            total += torch.bmm(a, b)
        self.is_empty = False

    def finish(self) -> None:
        """End a group."""
        if self.of_parts is not None:
            torch.sum(self.of_parts, 0, keepdim=True, out=self.of_group)


def _write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute ``out = a b``; out may be wider."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
