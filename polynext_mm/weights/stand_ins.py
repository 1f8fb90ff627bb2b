"""The classes besides weights that the restricted reader accepts, and their stand-ins.

The reader calls whatever is allowed. Types without side effects (paths, dates) are allowed as they
are. NumPy's constructors are not safe to call for untrusted files (a crafted dtype crashes the
interpreter), and mmengine may not be installed, so stand-ins of this module are allowed under their
names. They record what the file says, and are turned into values once all of it is read.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import torch

from .errors import shown

# kind and size: bools, integers, floating-point and complex numbers, bytes, strings
_NUMERIC = re.compile(r'[<|=]?(b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,4})')


class _Dtype:
    """``numpy.dtype``, for numbers and short strings only."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise ValueError(f'a NumPy dtype of other than numbers: {shown(str(code))}')
        self.code = code.lstrip('<|=')

    def __setstate__(self, state: tuple) -> None:
        _, order, *layout = state
        # subarrays and fields have a longer state, and mm does not write them
        if order not in ('<', '|', '=') or any(layout[:3]):
            raise ValueError('a NumPy dtype that is not plain')

    def value(self) -> str:
        return self.code


class _Array:
    """``numpy.ndarray``: shape, dtype and bytes; for a scalar, the shape is None."""

    def __init__(
        self,
        shape: tuple[int, ...] | None = (0,),
        dtype: Any = None,
        data: Any = b'',
        order: str = 'C',
    ):
        self.shape, self.dtype, self.data, self.order = shape, dtype, data, order

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.shape, self.dtype, self.data = shape, dtype, data
        self.order = 'F' if is_fortran else 'C'

    def value(self) -> Any:
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.data, (bytes, bytearray)):
            raise ValueError('a malformed NumPy array')
        if importlib.util.find_spec('numpy') is None:
            dtype = {'f8': torch.float64, 'f4': torch.float32}.get(self.dtype.code, torch.int64)
            values = torch.frombuffer(bytearray(self.data), dtype=dtype)
            return values if self.shape is not None else values[0].item()
        import numpy as np

        array = np.frombuffer(self.data, np.dtype(self.dtype.code))
        if self.shape is None:
            (scalar,) = array
            return scalar
        return array.reshape(self.shape, order='F' if self.order == 'F' else 'C').copy()


def _empty_array(*_: Any) -> _Array:
    return _Array()  # its state follows


def _scalar(dtype: Any, data: Any = b'') -> _Array:
    return _Array(None, dtype, data)


def _array_of(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(shape, dtype, data, order)


class _History:
    """``mmengine.logging.HistoryBuffer``: its values, counts and length."""

    def __init__(self, values: Any = (), counts: Any = (), max_length: Any = 1_000_000):
        self.parts = (values, counts, max_length)

    def __setstate__(self, state: dict) -> None:
        self.parts = (state['_log_history'], state['_count_history'], state['max_length'])

    def value(self) -> Any:
        values, counts, max_length = (_value(part) for part in self.parts)
        if type(max_length) is not int:
            raise ValueError('a malformed HistoryBuffer')
        if importlib.util.find_spec('mmengine') is None:
            return BareHistory(_log_history=values, _count_history=counts, max_length=max_length)
        from mmengine.logging import HistoryBuffer

        for part in (values, counts):
            if getattr(part, 'ndim', 0) != 1 or part.dtype.kind not in 'biuf':
                raise ValueError('a malformed HistoryBuffer')
        return HistoryBuffer(values, counts, max_length)


class BareHistory(argparse.Namespace):
    """The attributes of a ``HistoryBuffer``, for use without mmengine."""


def _attribute(owner: Any = None, name: Any = None) -> None:
    """Stand in for ``getattr``, by which a pickled HistoryBuffer refers to its methods."""
    if owner is not _History and not isinstance(owner, _History):
        raise ValueError(f'getattr of {shown(type(owner).__name__)}')


class _Namespace:
    """``argparse.Namespace``."""

    def value(self) -> argparse.Namespace:
        return argparse.Namespace(**_walked(vars(self), {}))


def _plain_dict(items: Any = None) -> dict:
    """Stand in for subclasses of dict, such as ``defaultdict``, whose argument is a factory."""
    return dict(items) if isinstance(items, dict) else {}


def _plain_list(items: Iterable = (), max_length: Any = None) -> list:
    return list(items)


_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_PATH = type(pathlib.Path())

#: For ``torch.serialization.safe_globals``: classes, or stand-ins with the names they replace.
ALLOWED = [
    *((kind, f'builtins.{kind.__name__}') for kind in (bool, complex, dict, float, frozenset)),
    *((kind, f'builtins.{kind.__name__}') for kind in (int, list, set, slice, str, tuple)),
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    # the names until Python 3.12, and in 3.13
    *((_PATH, f'{module}.{_PATH.__name__}') for module in ('pathlib', 'pathlib._local')),
    (_plain_list, 'collections.deque'),
    (_plain_dict, 'collections.defaultdict'),
    (_plain_dict, 'mmengine.config.config.ConfigDict'),
    (_Namespace, 'argparse.Namespace'),
    (_History, _HISTORY),
    (_attribute, 'builtins.getattr'),
    *((_attribute, f'{_HISTORY}.{name}') for name in ('min', 'max', 'current', 'mean')),
    (_Dtype, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    *(
        (stand_in, f'{core}.{name}')
        for core in ('numpy.core', 'numpy._core')  # the names in NumPy 1 and in NumPy 2
        for stand_in, name in (
            (_scalar, 'multiarray.scalar'),
            (_empty_array, 'multiarray._reconstruct'),
            (_array_of, 'numeric._frombuffer'),
        )
    ),
]
_STAND_INS = (_Dtype, _Array, _History, _Namespace)


def rebuilt(content: Any) -> Any:
    """Return the content of a file with its stand-ins replaced by values.

    Raises:
        ValueError: If a stand-in holds malformed data.
    """
    return _walked(content, {})


def _value(part: Any) -> Any:
    return part.value() if isinstance(part, _STAND_INS) else part


def _walked(value: Any, seen: dict[int, Any]) -> Any:
    """Replace stand-ins in place; shared objects stay shared."""
    if not isinstance(value, (dict, list, tuple, *_STAND_INS)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # a container that holds itself
    if isinstance(value, _STAND_INS):
        seen[id(value)] = value.value()
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = _walked(item, seen)
    elif isinstance(value, list):
        value[:] = [_walked(item, seen) for item in value]
    elif type(value) is tuple:  # torch.Size holds numbers
        items = tuple(_walked(item, seen) for item in value)
        if any(one is not other for one, other in zip(items, value)):
            seen[id(value)] = items
    return seen[id(value)]
