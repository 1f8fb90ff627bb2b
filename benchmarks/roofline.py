"""The least time that a step can take, from the operations in it and the rates of the machine."""

import dataclasses

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from measure import measure, seconds
from report import Record
from subjects import Setting, Subject, make_workload


class Roofline(TorchDispatchMode):
    """Add up FLOPs, bytes and least times of all operations that run under it.

    An operation takes at least the time for its floating-point operations, which matrix products,
    convolutions and attention have, and at least the time to move its inputs and outputs; the
    longer of the two counts. Operations that a compiler fuses, or whose inputs are in a cache, can
    be faster.

    Args:
        flops: Floating-point operations per second.
        bandwidth: Bytes per second.
    """

    UNMOVED = ('aten::_unsafe_view', 'aten::empty', 'aten::empty_like', 'aten::new_empty')

    def __init__(self, flops: float, bandwidth: float):
        super().__init__()
        self.rates = flops, bandwidth
        self.flops = self.bytes = self.seconds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not is_view(func) and func._schema.name not in self.UNMOVED:
            formula = flop_counter.flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            tensors = (
                t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, torch.Tensor)
            )
            moved = sum(tensor.nbytes for tensor in tensors)
            self.flops += flops
            self.bytes += moved
            self.seconds += max(flops / self.rates[0], moved / self.rates[1])
        return out


def is_view(func: torch._ops.OpOverload) -> bool:
    """Return whether an operator returns views of its inputs and writes to none."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def floor(subject: Subject, setting: Setting, rounds: int, warmup: int) -> Record:
    """Compare the least time of a step at this machine's rates with the measured time."""
    roofline = Roofline(gemm_rate(), copy_rate())
    eager = tuple(modifier for modifier in subject.modifiers if modifier != 'compile')
    work = make_workload(
        dataclasses.replace(subject, modifiers=eager), dataclasses.replace(setting, device='meta')
    )
    with roofline:
        work.step()
    (result,) = measure([subject], setting, rounds, warmup)
    return {
        'mode': setting.mode,
        'size': setting.shown_size,
        'model': subject.label,
        'GMACs': roofline.flops / 2e9,
        'GB moved': roofline.bytes / 1e9,
        'GEMM GFLOP/s': roofline.rates[0] / 1e9,
        'copy GB/s': roofline.rates[1] / 1e9,
        'floor ms': 1e3 * roofline.seconds,
        'measured ms': result.median and 1e3 * result.median,
        'measured / floor': result.median and result.median / roofline.seconds,
    }


def gemm_rate(n: int = 1024) -> float:
    """Return FLOPs per second, the best of ten float32 products of (n, n) matrices."""
    a, b, out = (torch.ones(n, n) for _ in range(3))
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out), 'cpu') for _ in range(10))


def copy_rate(count: int = 1 << 26) -> float:
    """Return bytes read and written per second, the best of ten copies of ``count`` float32.

    They should not fit into a cache.
    """
    source, target = torch.ones(count), torch.ones(count)
    return 8 * count / min(seconds(lambda: target.copy_(source), 'cpu') for _ in range(10))
