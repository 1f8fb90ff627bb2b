"""Stand-ins through which checkpoints' NumPy, mmengine and argparse values are read.

torch's restricted reader calls what is allowed. NumPy's constructors are no functions to call for a
stranger (a dtype made on purpose crashes the interpreter), so stand-ins of this module are allowed
under their names. They keep what the file says, and become values when all of it is read.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, shown

# by kind and size: truth values, integers, floating point, complex numbers, bytes, texts
_NUMERIC = re.compile(r'[<|=]?(b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,4})')


class _Dtype:
    """``numpy.dtype``, of numbers and short texts alone."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise ValueError(f'a NumPy dtype of other than numbers: {shown(str(code))}')
        self.code = code.lstrip('<|=')

    def __setstate__(self, state: tuple) -> None:
        _, order, *layout = state
        # subarrays and fields have more, and are not written by mm
        if order not in ('<', '|', '=') or any(layout[:3]):
            raise ValueError('a NumPy dtype that is not plain')


class _Array:
    """``numpy.ndarray``: shape, dtype and bytes; of a scalar, the shape is None."""

    shape: tuple[int, ...] | None = (0,)
    dtype: _Dtype | None = None
    data = b''
    order = 'C'

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, is_fortran, self.data = state
        self.order = 'F' if is_fortran else 'C'


def _empty_array(*_: Any) -> _Array:
    return _Array()  # its state follows


def _scalar(dtype: Any, data: Any = b'') -> _Array:
    array = _Array()
    array.__setstate__((1, None, dtype, False, data))
    return array


class _History:
    """``mmengine.logging.HistoryBuffer``: its values, counts and length."""

    def __init__(self, *_: Any):
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict) -> None:
        keys = ('_log_history', '_count_history', 'max_length')
        self.state = {key: state[key] for key in keys}


def _attribute(owner: Any, name: Any) -> None:
    """Stand for ``getattr``, by which a pickled HistoryBuffer refers to its own methods."""
    if owner is not _History and not isinstance(owner, _History):
        raise ValueError(f'getattr of {shown(type(owner).__name__)}')


class BareHistory(argparse.Namespace):
    """The attributes of a ``HistoryBuffer`` in a file, read where mmengine is not installed."""


class _Namespace:
    """``argparse.Namespace``."""


#: What ``torch.serialization.safe_globals`` takes: stand-ins, and the names that they stand for.
STAND_INS = [
    slice,
    (_Namespace, 'argparse.Namespace'),
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_attribute, 'builtins.getattr'),
    (_Dtype, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    *(
        (stand_in, f'{core}.multiarray.{name}')
        for core in ('numpy.core', 'numpy._core')  # the names in NumPy 1 and in NumPy 2
        for stand_in, name in ((_scalar, 'scalar'), (_empty_array, '_reconstruct'))
    ),
]


def rebuilt(content: Any) -> Any:
    """Return what a file holds with values in the place of stand-ins, and every tensor checked.

    Raises:
        CheckpointError: If a tensor is not dense, or claims more elements than there are.
        ValueError: If something is not what its name says.
    """
    return _Rebuilder().build(content, ())


_PLAIN = (set, frozenset, slice, bytearray, torch.dtype, torch.device)


class _Rebuilder:
    """Walks through the content of a file; what is there twice stays one object."""

    def __init__(self):
        self.built: dict[int, Any] = {}

    def build(self, value: Any, place: tuple) -> Any:
        if isinstance(value, Tensor):
            return _checked(value, place)
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        if id(value) not in self.built:
            self.built[id(value)] = None  # of what holds itself
            self.built[id(value)] = self._new(value, place)
        return self.built[id(value)]

    def _new(self, value: Any, place: tuple) -> Any:
        if isinstance(value, dict):
            items = {key: self.build(item, (*place, key)) for key, item in value.items()}
            return items if type(value) is dict else type(value)(items)
        if isinstance(value, (list, tuple)):
            items = [self.build(item, (*place, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, _Namespace):
            return argparse.Namespace(**self.build(vars(value), place))
        if isinstance(value, _Array):
            return _array(value)
        if isinstance(value, _Dtype):
            return value.code
        if isinstance(value, _History):
            return _history(**self.build(value.state, place))
        if isinstance(value, _PLAIN):
            return value
        raise ValueError(f'a {type(value).__name__} in the place of a value, {_where(place)}')


def _checked(value: Tensor, place: tuple) -> Tensor:
    """Return a tensor that is dense and has all the elements that it claims."""
    kind = None
    if value.is_quantized:
        kind = 'quantized'
    elif value.is_nested:
        kind = 'nested'
    elif value.layout is not torch.strided:
        kind = 'sparse'
    elif value.device.type == 'meta':
        kind = 'meta'
    if kind:
        raise CheckpointError(
            f'holds a {kind} tensor, {_where(place)}: weights are dense, on the CPU and in '
            'floating point'
        )
    size = value.untyped_storage().nbytes() // value.itemsize
    if value.numel() > size:
        raise CheckpointError(
            f'claims {value.numel()} elements for {_where(place)} and has {size}: it was not read'
        )
    return value


def _where(place: tuple) -> str:
    return shown('.'.join(shown(str(key)) for key in place))


def _array(array: _Array) -> Any:
    if not isinstance(array.dtype, _Dtype) or not isinstance(array.data, (bytes, bytearray)):
        raise ValueError('a malformed NumPy array')
    if importlib.util.find_spec('numpy') is None:
        dtype = {'f8': torch.float64, 'f4': torch.float32}.get(array.dtype.code, torch.int64)
        values = torch.frombuffer(bytearray(array.data), dtype=dtype)
        return values if array.shape is not None else values[0].item()
    import numpy as np

    values = np.frombuffer(array.data, np.dtype(array.dtype.code))
    if array.shape is None:
        (scalar,) = values
        return scalar
    return values.reshape(array.shape, order=array.order).copy()


def _history(_log_history: Any, _count_history: Any, max_length: Any) -> Any:
    if importlib.util.find_spec('mmengine') is None:
        return BareHistory(
            _log_history=_log_history, _count_history=_count_history, max_length=max_length
        )
    from mmengine.logging import HistoryBuffer

    for values in (_log_history, _count_history):
        if getattr(values, 'ndim', 0) != 1 or values.dtype.kind not in 'biuf':
            raise ValueError('a malformed HistoryBuffer')
    if type(max_length) is not int:
        raise ValueError('a malformed HistoryBuffer')
    return HistoryBuffer(_log_history, _count_history, max_length)
