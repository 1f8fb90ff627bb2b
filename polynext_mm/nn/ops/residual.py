"""The end of a branch: ``x + keep * branch``.

The kernel rounds the gradient of the branch to its dtype as it is scaled, in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .blocks import add_branch, narrowed, scaled


def residual(x: Tensor, branch: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Compute ``x + keep * branch``.

    Args:
        x: The residual stream, (B, H, W, C).
        branch: Of the same shape, in the dtype of ``x`` or a narrower one.
        keep: The factor of drop path, (B, 1, 1, 1), or None for 1.
        out: Where the result may be written where no gradient is needed: contiguous, like ``x`` or
            ``x`` itself.

    Returns:
        The map (B, H, W, C) in the dtype of ``x``, new unless it is ``out``.
    """
    return dispatch.run(plain, _Kernel, x, branch, keep, out=out)


def plain(x, branch, keep):
    return x + scaled(branch, keep)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def infer(x, branch, keep, out=None):
        y = torch.empty_like(x) if out is None else out
        add_branch(x, branch, keep, out=y)
        return y

    @staticmethod
    def forward(ctx, x, branch, keep):
        ctx.save_for_backward(keep)
        ctx.dtype = branch.dtype
        return _Kernel.infer(x, branch, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return grad, narrowed(grad, keep, ctx.dtype), None
