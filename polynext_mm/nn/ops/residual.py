"""The end of a branch: ``x + keep * gate * branch``.

The kernel makes one pass in each direction: the gradient of the branch is scaled and rounded to its
dtype at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .blocks import add_branch, narrowed, scaled


def residual(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Compute ``x + keep * gate * branch``.

    Args:
        x: The residual stream, (B, H, W, C).
        branch: Of the same shape, in the dtype of ``x`` or a narrower one.
        gate: A scalar, or None for 1.
        keep: The drop path factor, (B, 1, 1, 1), or None for 1. It gets no gradient.

    Returns:
        A new map (B, H, W, C) in the dtype of ``x``.
    """
    factor = keep if gate is None else gate if keep is None else keep * gate
    return dispatch.run(plain, _Kernel, x, branch, factor)


def plain(x, branch, factor):
    return x + scaled(branch, factor)


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, branch, factor):
        y = torch.empty_like(x)
        add_branch(x, branch, factor, out=y)
        return y

    @staticmethod
    def forward(ctx, x, branch, factor):
        ctx.save_for_backward(factor, branch if ctx.needs_input_grad[2] else None)
        ctx.dtype = branch.dtype
        return _Kernel.infer(x, branch, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        factor, branch = ctx.saved_tensors
        grad_factor = None if branch is None else (grad * branch).sum_to_size(factor.shape)
        return grad, narrowed(grad, factor, ctx.dtype), grad_factor
