"""What Triton's interpreter, as of 3.8, has to be mended in before kernels can be tested on it.

It holds bfloat16 as uint16, multiplies matrices of them as the integers, and truncates float32 to
bfloat16 where devices round. And every call of a function of a kernel prepares the language anew,
though its kernel has done so: nine tenths of the time of a small kernel.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

prepared = set()  # modules, for the whole process, as the interpreter does it


def mend(monkeypatch) -> None:
    """Mend the interpreter for as long as the fixture lives."""
    create_dot, convert_float = (
        interpreter.InterpreterBuilder.create_dot,
        interpreter._convert_float,
    )

    def dot_of_values(self, a, b, *args):
        return create_dot(self, widened(a), widened(b), *args)

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return to_float32(data).view(np.uint32)
        return convert_float(data, source, target, rounding_mode)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpreterBuilder, 'create_dot', dot_of_values)
    monkeypatch.setattr(interpreter, '_convert_float', rounded)
    monkeypatch.setattr(interpreter.InterpretedFunction, '__call__', call)


def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(to_float32(handle.data), tl.float32)


def to_float32(data: np.ndarray) -> np.ndarray:
    """From bfloat16 held as uint16."""
    return torch.from_numpy(np.ascontiguousarray(data)).view(torch.bfloat16).float().numpy()


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """To bfloat16 held as uint16."""
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
