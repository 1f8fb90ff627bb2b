"""Shared by the Triton kernels: the devices that run them, and their registration with torch.

They are operators of torch, so that shapes are known for tensors without memory (meta and fake
ones, a compiler's). Autograd is handled above them, in the operations that call them. So they are
plain operators, with less host overhead than those of ``torch.library.custom_op``, and tell
autograd themselves what they write into (``increment_version``).
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .precision import Like

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_MAJOR = 8  # lowest compute capability of NVIDIA devices that Triton supports


@triton.jit
def _kernel():
    pass


INTERPRETED = not isinstance(_kernel, triton.JITFunction)  # with TRITON_INTERPRET=1

_library = torch.library.Library('polynext_mm', 'FRAGMENT')


@torch.compiler.assume_constant_result  # a compiler need not trace it
def runs_on(device: torch.device) -> bool:
    """Return whether a device runs Triton kernels; meta tensors stand for such a device."""
    if INTERPRETED or device.type == 'meta':
        return True
    if device.type != 'cuda':  # ROCm devices are 'cuda' too
        return False
    if torch.version.hip is not None or not torch.cuda.is_initialized():  # such as fake tensors
        return True
    return torch.cuda.get_device_properties(device).major >= MIN_MAJOR


def takes_like(x: 'Tensor | Like') -> bool:
    """Return whether kernels support contiguous maps of a dtype on a device."""
    return x.dtype in DTYPES and runs_on(x.device)


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """Return whether kernels support these tensors: their layouts, dtypes and device.

    The device is that of the first.
    """
    return runs_on(first.device) and all(
        t is None or (t.dtype in DTYPES and t.is_contiguous()) for t in (first, *others)
    )


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Make a function that launches kernels an operator of torch.

    Args:
        schema: As torch writes it: ``name(Tensor x) -> Tensor``.
        fake: Makes the outputs, from the same arguments, without computing them.
    """
    name = schema.partition('(')[0]

    def define(function):
        _library.define(schema)
        for key in ('CUDA', 'CPU') if INTERPRETED else ('CUDA',):
            _library.impl(name, function, key)
        torch.library.register_fake(f'polynext_mm::{name}', fake, lib=_library)
        return getattr(torch.ops.polynext_mm, name).default

    return define
