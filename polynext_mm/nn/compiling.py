"""Requirements and settings of torch.compile."""

import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from ..compat.torch_features import COMPILE_CELLS

COMPILE_MODES = ('default', 'reduce-overhead')  # modes of torch.compile


def compile_stacks(stacks: Iterable[nn.Module], mode: str) -> None:
    """Compile the stacks of a network; see :meth:`polynext_mm.nn.PolyNeXt.compile_cells`."""
    if mode not in COMPILE_MODES:
        raise ValueError(f'mode must be one of {COMPILE_MODES}, got {mode!r}')
    if not COMPILE_CELLS.is_there:
        raise RuntimeError(
            f'{COMPILE_CELLS.what_is_missing()}: upgrade torch, or leave compile_cells out'
        )
    require_compiler('torch.compile', ' or turn compilation off')
    # To Dynamo, all stacks are one function. Its default of 8 versions is too few for four stages,
    # with and without drop path, in training and evaluation, and beyond that limit code runs
    # uncompiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
    for stack in stacks:
        stack.compile(dynamic=True, mode=mode)


def require_compiler(user: str, alternative: str = '') -> None:
    """Check that there is a C++ compiler.

    Args:
        user: What needs it, for the message.
        alternative: An alternative, for the end of the message.

    Raises:
        RuntimeError: If there is none.
    """
    compiler = os.environ.get('CXX', 'g++')
    if not any(shutil.which(name) for name in (compiler, 'clang++')):
        raise RuntimeError(
            f'{user} needs a C++ compiler and there is no {compiler}: '
            f'install one (Debian: apt install g++){alternative}'
        )
