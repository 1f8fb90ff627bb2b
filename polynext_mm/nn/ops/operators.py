"""Our operations as operators of torch, or, where torch does not support that, as functions.

An operator stays whole in a compiled graph and under torch's FLOP counter. torch before 2.4 gets an
``autograd.Function`` that uses as much memory; there, compilers and meta tensors use ordinary
operations (:func:`~polynext_mm.nn.ops.dispatch.run_operator`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ...compat.torch_features import CUSTOM_OPERATORS, register_flop_formula


def operator(
    name: str,
    fake: Callable,
    flops: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Make a function of tensors an operator of torch, ``polynext_mm::NAME``.

    Args:
        name: Of the operator.
        fake: Makes the outputs, from the same arguments, without computing them.
        flops: Returns the floating-point operations, from the shapes of the arguments.
        setup_context: As for ``torch.library.register_autograd``; None without a gradient.
        backward: Likewise.
    """

    def define(function: Callable) -> Callable:
        if not CUSTOM_OPERATORS.is_there:
            if setup_context is None or backward is None:
                return function
            return _as_function(function, setup_context, backward)
        custom = torch.library.custom_op(f'polynext_mm::{name}', function, mutates_args=())
        custom.register_fake(fake)
        if backward is not None:
            custom.register_autograd(backward, setup_context=setup_context)
        register_flop_formula(getattr(torch.ops.polynext_mm, name), flops)
        return custom

    return define


def _as_function(function: Callable, setup_context: Callable, backward_of: Callable) -> Callable:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return backward_of(ctx, *grads)

    return Function.apply
