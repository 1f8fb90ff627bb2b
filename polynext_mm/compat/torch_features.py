"""What this torch has: the one place that asks, from 2.1, the oldest that is supported, on.

What cannot be had with an older torch is a :class:`Feature`, whose absence is told where it is
asked for. What can be done otherwise is a function, which says since when torch itself does it.
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
    """Something that not every torch has.

    Args:
        name: What messages call it.
        since: The first release that has it, such as '2.14'.
        is_there: Whether this torch has it.
    """

    name: str
    since: str
    is_there: bool

    def what_is_missing(self) -> str:
        """Return a line that says which torch has it, and which this is."""
        return f'{self.name} needs torch {self.since} or newer, and this is {torch.__version__}'


def _from_release(name: str, since: str) -> Feature:
    return Feature(name, since, _RELEASE >= tuple(map(int, since.split('.'))))


#: Operators of our own that a compiler takes into its graph, and that a FLOP counter knows.
CUSTOM_OPERATORS = _from_release('operators for a compiler', '2.4')
#: Before, there are CPUs and CUDA, each with functions of its own.
AUTOCAST_BY_DEVICE = _from_release('autocast of every device', '2.4')
#: Autocast to float16, and all operations in it.
FLOAT16_ON_CPUS = _from_release('float16 on CPUs', '2.4')
#: ``weights_only=True`` without the hole of CVE-2025-32434, and stand-ins by name.
SAFE_READER = _from_release('a safe torch.load(weights_only=True)', '2.6')
#: The oldest release on which the kernels in Triton were run.
TRITON_KERNELS = _from_release("this package's kernels in Triton", '2.11')
#: Before, the compiler fails at maps of any size in training.
COMPILE_CELLS = _from_release('compile_cells', '2.12')
#: Graphs for images of any size.
EXPORT = _from_release('export', '2.14')
#: What a user may ask for by name; the others are done in another way.
OPTIONAL = (TRITON_KERNELS, COMPILE_CELLS, EXPORT)


def matching_torchvision() -> str:
    """Return the requirement that brings the torchvision of this torch, such as 0.16 for 2.1."""
    return f'torchvision==0.{_RELEASE[1] + 15}.*'


# ------------------------------------------------------------------------------------------------
# Compilers and exporters
# ------------------------------------------------------------------------------------------------


if _RELEASE >= (2, 3):
    from torch.compiler import is_compiling
else:

    def is_compiling() -> bool:
        """Return whether a compiler traces this code."""
        # importing torch._dynamo takes seconds
        return 'torch._dynamo' in sys.modules and torch._dynamo.is_compiling()


if _RELEASE >= (2, 7):
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        """Return whether ``torch.export`` traces this code: not told, and not supported."""
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
    """Return the dtype of autocast on a kind of device; None where it is off, or not to be had."""
    if not can_autocast(device):
        return None
    if AUTOCAST_BY_DEVICE.is_there:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to a dtype, float32 being none, which torch takes for a dtype of CPUs since 2.4."""
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype)


def set_autocast_enabled(device: str, enabled: bool) -> None:
    """Turn autocast on or off, on a kind of device that has it."""
    if AUTOCAST_BY_DEVICE.is_there:
        torch.set_autocast_enabled(device, enabled)
    elif device == 'cpu':
        torch.set_autocast_cpu_enabled(enabled)
    else:
        torch.set_autocast_enabled(enabled)


def can_autocast_to(device: str, dtype: torch.dtype) -> bool:
    """Return whether autocast to a dtype is there, and not slower than float32."""
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
    """Return whether this CPU has instructions for bfloat16 that torch uses, on Linux alone.

    Without them a training step takes four to seven times as long as in float32. Read from the
    system, since torch tells from 2.10 on.
    """
    try:
        flags = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return False
    return re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', flags) is not None


def grad_scaler(device: str, init_scale: float, enabled: bool) -> torch.cuda.amp.GradScaler:
    """Return a scaler of the loss: ``torch.amp.GradScaler``, of every device, since torch 2.3."""
    if _RELEASE >= (2, 3):
        return torch.amp.GradScaler(device, init_scale=init_scale, enabled=enabled)
    return torch.cuda.amp.GradScaler(init_scale=init_scale, enabled=enabled and device == 'cuda')


# ------------------------------------------------------------------------------------------------
# Devices, modules, optimizers
# ------------------------------------------------------------------------------------------------


def device_module(device: str) -> ModuleType:
    """Return ``torch.cuda`` and its like: ``torch.get_device_module`` of torch 2.4."""
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
    """Return whether ``AdamW(fused=True)`` is there: on CPUs, since torch 2.4."""
    return device == 'cuda' or _RELEASE >= (2, 4)


@contextlib.contextmanager
def no_fused_attention_layers() -> Iterator[None]:
    """Let torch's attention layers call one operator after the other, and not one for all.

    ``torch.backends.mha`` is there since torch 2.3. Before, layers whose inputs need a gradient do
    so: in evaluation, let the images of a model need one, and gradients be enabled.
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
    """Let torch's FLOP counter know an operator, of whatever overload: it does so since 2.5."""
    flop_counter.register_flop_formula(operator)(formula)
    registry = flop_counter.flop_registry
    if operator not in registry:  # which is where the counter looks
        registry[operator] = registry[operator.default]
