"""The one place that decides whether kernels run.

A kernel computes the same as a layer's own equation or an operation's plain form, with less memory
and time. Those are ordinary torch operations, which autograd, compilers and exporters can handle.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...compat import torch_features

if TYPE_CHECKING:
    from typing import TypeGuard


class Kernel(torch.autograd.Function):
    """An autograd function, with a variant for calls that need no gradient."""

    @staticmethod
    def infer(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


#: The possible settings: Triton kernels are used if a training found them correct, or without a
#: check, or not at all.
KERNEL_MODES = ('checked', 'unchecked', 'off')
KERNELS_VARIABLE = 'POLYNEXT_KERNELS'


def kernel_mode(default: str = 'checked') -> str:
    """Return one of :data:`KERNEL_MODES`: the environment's if it is set, or the default.

    Raises:
        ValueError: If it is none of them.
    """
    mode = os.environ.get(KERNELS_VARIABLE) or default
    if mode not in KERNEL_MODES:
        name = KERNELS_VARIABLE if os.environ.get(KERNELS_VARIABLE) else 'kernels'
        raise ValueError(f'{name} is {mode!r}: set it to {", ".join(KERNEL_MODES[:-1])} or off')
    return mode


_plain = False
_triton = kernel_mode() != 'off'
_refused: frozenset[str] = frozenset()  # modules of Triton kernels
_recomputing = False


@contextlib.contextmanager
def plain_ops(enabled: bool = True) -> Iterator[None]:
    """Run no kernel of this package, in all threads: layers compute their equations in torch.

    Try this first if results on a machine look wrong: if they change, a kernel is to blame. The
    setting in forward also applies to its backward. Autograd then keeps every intermediate, which
    in attention includes the whole (tokens x tokens) matrix of each head.

    Args:
        enabled: False returns to the kernels inside an outer ``plain_ops()``.
    """
    global _plain
    before, _plain = _plain, enabled
    try:
        yield
    finally:
        _plain = before


@contextlib.contextmanager
def triton_ops(enabled: bool) -> Iterator[None]:
    """Choose whether kernels written in Triton may run, in all threads; by default they may, unless
    POLYNEXT_KERNELS=off is in the environment.

    Without them, operations use the kernels written in torch, as on other devices. Try this if
    :func:`plain_ops` fixes wrong results on a GPU, or if Triton does not compile. The setting in
    forward also applies to its backward.

    Args:
        enabled: True returns to Triton inside an outer ``triton_ops(False)``.
    """
    global _triton
    before, _triton = _triton, enabled
    try:
        yield
    finally:
        _triton = before


def triton_module(name: str) -> ModuleType | None:
    """Import a module of Triton kernels.

    None without Triton, which not every platform has, or with a torch too old to be tested.
    """
    if not torch_features.TRITON_KERNELS.is_there or importlib.util.find_spec('triton') is None:
        return None
    return importlib.import_module(f'.{name}', __package__)


def by_triton(module: ModuleType | None, *args) -> TypeGuard[ModuleType]:
    """Return whether to use a module of :func:`triton_module`.

    It must be available and allowed, and its ``supports`` must accept the arguments.
    """
    return triton_wanted(module) and module.supports(*args)


def refuse_triton(modules: Collection[str]) -> frozenset[str]:
    """Use torch's operations instead of some Triton kernels, in all threads, from now on.

    Args:
        modules: Names of modules of kernels, as in :func:`triton_module`. They replace those
            refused before.

    Returns:
        What was refused before.
    """
    global _refused
    before = frozenset(name.rpartition('.')[2] for name in _refused)
    _refused = frozenset(f'{__package__}.{name}' for name in modules)
    return before


def triton_wanted(module: ModuleType | None) -> TypeGuard[ModuleType]:
    """Return whether a module of :func:`triton_module` is available and allowed."""
    return module is not None and _triton and module.__name__ not in _refused


def triton_choice() -> tuple[bool, frozenset[str]]:
    """Return what decides which Triton kernels may run."""
    return _triton, _refused


def remember(ctx) -> None:
    """Keep for backward what :func:`triton_ops` chose in forward."""
    ctx.triton = _triton


def backward(function: Callable) -> Callable:
    """Make a kernel's backward use what its forward remembered; it is once differentiable."""

    @once_differentiable
    @functools.wraps(function)
    def wrapped(ctx, *grads):
        if ctx.triton == _triton:
            return function(ctx, *grads)
        with triton_ops(ctx.triton):
            return function(ctx, *grads)

    return wrapped


def plain_wanted() -> bool:
    """Return whether :func:`plain_ops` is in effect."""
    return _plain


def checkpoint_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """Return contexts that let checkpointing recompute with the same forms (``context_fn``)."""
    return contextlib.nullcontext(), _computing_again(_plain, _triton)


@contextlib.contextmanager
def _computing_again(plain: bool, triton: bool) -> Iterator[None]:
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        with plain_ops(plain), triton_ops(triton):
            yield
    finally:
        _recomputing = before


def recomputing() -> bool:
    """Return whether a checkpointed forward is recomputed; norms must not track it again."""
    return _recomputing


def exporting() -> bool:
    """Return whether a graph is being recorded that may hold only torch's own operators.

    That is ``torch.export`` and ``torch.jit.trace``, and ONNX export through either.
    """
    return torch_features.is_exporting() or torch.jit.is_tracing()


def kernels_allowed() -> bool:
    """Return whether kernels may run: not under :func:`plain_ops`, in exports or in compilers."""
    return not (_plain or exporting() or torch_features.is_compiling())


def run(plain: Callable, kernel: type[Kernel], *args):
    """Compute an operation with its plain form or its kernel.

    Args:
        plain: The operation in ordinary torch, a function.
        kernel: As for :func:`run_kernel`.
        args: Arguments of both.
    """
    return run_kernel(kernel, *args) if kernels_allowed() else plain(*args)


def run_kernel(
    kernel: type[Kernel],
    *args,
    weights: Sequence[Tensor | None] = (),
    out: Tensor | None = None,
):
    """Compute an operation with its kernel.

    Args:
        kernel: The kernel, called with contiguous tensors and without autocast: dtypes are decided
            beforehand.
        args: Its arguments.
        weights: Its last arguments, already prepared and passed with whatever strides they have.
        out: Where ``infer`` may write the result, for kernels that take it; it may be an argument.
            Ignored if gradients are needed.
    """
    args = *(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args), *weights
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    with _without_autocast(device):
        if _need_grad(args):
            return kernel.apply(*args)
        return kernel.infer(*args) if out is None else kernel.infer(*args, out=out)


def run_operator(plain: Callable, operator: Callable, *args):
    """Compute an operation with its plain form or an operator of ``torch.library``.

    A compiler keeps the operator in its graph.

    Args:
        plain: The operation in ordinary torch, a function.
        operator: A function that calls the operator.
        args: Arguments of both.
    """
    takes_operators = torch_features.CUSTOM_OPERATORS.is_there or not (
        torch_features.is_compiling() or args[0].is_meta
    )
    return plain(*args) if _plain or exporting() or not takes_operators else operator(*args)


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """Turn autocast off, at a lower cost than ``torch.autocast(enabled=False)``."""
    if torch_features.autocast_dtype(device) is None:
        yield
        return
    torch_features.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch_features.set_autocast_enabled(device, True)


def _need_grad(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )
