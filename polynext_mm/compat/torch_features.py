"""Differences between versions of torch, from 2.1, the oldest supported one.

What an older torch cannot do is a :class:`Feature`, whose absence is reported when it is needed.
What can be done in another way is a function, which documents since when torch itself does it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.utils import flop_counter

_RELEASE = tuple(int(part) for part in torch.__version__.split('.')[:2])


class Feature(NamedTuple):
    """A feature that not every version of torch has.

    Args:
        name: Its name in messages.
        since: The first release that has it, such as '2.14'.
        is_there: Whether this torch has it.
    """

    name: str
    since: str
    is_there: bool

    def what_is_missing(self) -> str:
        """Return a line with the torch that the feature needs and the one installed."""
        return f'{self.name} needs torch {self.since} or newer, and this is {torch.__version__}'


def _from_release(name: str, since: str) -> Feature:
    return Feature(name, since, _RELEASE >= tuple(map(int, since.split('.'))))


#: Custom operators that compilers keep in their graphs and that the FLOP counter knows.
CUSTOM_OPERATORS = _from_release('operators for a compiler', '2.4')
#: Before that, only CPUs and CUDA have it, each with its own functions.
AUTOCAST_BY_DEVICE = _from_release('autocast of every device', '2.4')
#: Autocast to float16, and all operations in it.
FLOAT16_ON_CPUS = _from_release('float16 on CPUs', '2.4')
#: ``weights_only=True`` without CVE-2025-32434, and allowed classes under other names.
SAFE_READER = _from_release('a safe torch.load(weights_only=True)', '2.6')
#: The oldest release on which the Triton kernels were tested.
TRITON_KERNELS = _from_release("this package's kernels in Triton", '2.11')
#: Before that, the compiler fails in training on maps of dynamic size.
COMPILE_CELLS = _from_release('compile_cells', '2.12')
#: Graphs for images of any size.
EXPORT = _from_release('export', '2.14')
#: The features that a user can ask for; the others have substitutes.
OPTIONAL = (TRITON_KERNELS, COMPILE_CELLS, EXPORT)


def matching_torchvision() -> str:
    """Return the requirement of the torchvision that matches this torch, such as 0.16 for 2.1."""
    return f'torchvision==0.{_RELEASE[1] + 15}.*'


# ------------------------------------------------------------------------------------------------
# Compilers and exporters
# ------------------------------------------------------------------------------------------------


if _RELEASE >= (2, 3):
    from torch.compiler import is_compiling
else:

    def is_compiling() -> bool:
        """Return whether a compiler traces this code."""
        # do not import torch._dynamo, which takes seconds
        return 'torch._dynamo' in sys.modules and torch._dynamo.is_compiling()


if _RELEASE >= (2, 7):
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        """Return False: this torch cannot tell, and export with it is not supported."""
        return False


# ------------------------------------------------------------------------------------------------
# Autocast
# ------------------------------------------------------------------------------------------------


def can_autocast(device: str) -> bool:
    """Return whether a kind of device has autocast."""
    if AUTOCAST_BY_DEVICE.is_there:
        return torch.amp.is_autocast_available(device)
    return device in ('cpu', 'cuda')


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a kind of device; None where it is off or unavailable."""
    if not can_autocast(device):
        return None
    if AUTOCAST_BY_DEVICE.is_there:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return an autocast context, empty for float32, which CPUs accept only since torch 2.4."""
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype)


def set_autocast_enabled(device: str, enabled: bool) -> None:
    """Turn autocast on or off for a kind of device that has it."""
    if AUTOCAST_BY_DEVICE.is_there:
        torch.set_autocast_enabled(device, enabled)
    elif device == 'cpu':
        torch.set_autocast_cpu_enabled(enabled)
    else:
        torch.set_autocast_enabled(enabled)


def can_autocast_to(device: str, dtype: torch.dtype) -> bool:
    """Return whether autocast to a dtype is available and not slower than float32."""
    if not can_autocast(device):
        return False
    if dtype is not torch.bfloat16:
        return device != 'cpu' or FLOAT16_ON_CPUS.is_there
    if device == 'cpu':
        return has_fast_bfloat16()
    supported = getattr(device_module(device), 'is_bf16_supported', None)
    if supported is None:
        return True
    if _RELEASE >= (2, 4):
        return supported(including_emulation=False)
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def has_fast_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions that torch uses, on Linux only.

    Without them a training step takes four to seven times as long as in float32. This asks the
    system, since torch itself reports it only from 2.10 on.
    """
    try:
        flags = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return False
    return re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', flags) is not None


def grad_scaler(device: str, init_scale: float, enabled: bool) -> torch.cuda.amp.GradScaler:
    """Return a loss scaler: ``torch.amp.GradScaler``, for all devices since torch 2.3."""
    if _RELEASE >= (2, 3):
        return torch.amp.GradScaler(device, init_scale=init_scale, enabled=enabled)
    return torch.cuda.amp.GradScaler(init_scale=init_scale, enabled=enabled and device == 'cuda')


# ------------------------------------------------------------------------------------------------
# Devices, modules, optimizers
# ------------------------------------------------------------------------------------------------


def device_module(device: str) -> ModuleType:
    """Return ``torch.cuda`` or its counterpart: ``torch.get_device_module`` since torch 2.4."""
    return torch.get_device_module(device) if _RELEASE >= (2, 4) else getattr(torch, device)


def accelerator() -> str | None:
    """Return the kind of this machine's accelerator, if any: ``torch.accelerator`` of torch 2.6."""
    if _RELEASE < (2, 6):
        return 'cuda' if torch.cuda.is_available() else None
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator().type


def register_load_state_dict_pre_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call ``hook(module, state_dict, prefix, ...)`` before loading; a public method since 2.5."""
    if _RELEASE >= (2, 5):
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def has_fused_optimizers(device: str) -> bool:
    """Return whether ``AdamW(fused=True)`` is available: on CPUs, since torch 2.4."""
    return device == 'cuda' or _RELEASE >= (2, 4)


@contextlib.contextmanager
def no_fused_attention_layers() -> Iterator[None]:
    """Make torch's attention layers call separate operators instead of one fused one.

    ``torch.backends.mha`` exists since torch 2.3. Before that, only inputs that require a gradient
    have this effect: in evaluation, enable gradients and let the images require one.
    """
    if _RELEASE < (2, 3):
        with torch.enable_grad():
            yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def register_flop_formula(operator: torch._ops.OpOverloadPacket, formula: Callable) -> None:
    """Register a FLOP formula for all overloads of an operator, as torch itself does since 2.5."""
    flop_counter.register_flop_formula(operator)(formula)
    registry = flop_counter.flop_registry
    if operator not in registry:  # the counter looks here
        registry[operator] = registry[operator.default]
