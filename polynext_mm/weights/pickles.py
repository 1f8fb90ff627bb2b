"""Pickles parsed into descriptions: nothing in them is called, imported or allocated.

A pickle is a program for a small machine, and unpickling runs it. This module runs it with a table
of its own in place of Python's functions and classes: what is in the table yields a description (a
tensor by its storage, shape and strides; an array by its bytes), and anything else is refused. So a
pickle takes memory in proportion to its own length, whatever it claims.
"""

import argparse
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

# Far above what the largest checkpoint needs; a pickle of one-byte operations could still fill the
# memory with empty containers.
_MAX_OPERATIONS = 2_000_000
_MARGIN = 1 << 20
_MAX_DIMENSIONS = 16


class RefusedError(ValueError):
    """A pickle needs something that is not in the table."""


# ------------------------------------------------------------------------------------------------
# Descriptions
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """Where the numbers of tensors are.

    Attributes:
        key: Its name in the file.
        dtype: Of its elements; None for quantized ones.
        size: Number of elements.
        location: The device it was saved from.
    """

    key: str
    dtype: torch.dtype | None
    size: int
    location: str


@dataclass(frozen=True)
class TensorView:
    """A tensor: part of a storage.

    Raises:
        ValueError: If it does not lie inside its storage, or claims more elements than that has.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.stride)
        if not len(self.shape) == len(self.stride) <= _MAX_DIMENSIONS or not all(
            type(number) is int and 0 <= number < 2**62 for number in numbers
        ):
            raise ValueError('a tensor has a malformed shape')
        count, last = 1, self.offset
        for side, step in zip(self.shape, self.stride):
            count *= side
            last += (side - 1) * step
        size = self.storage.size * self.storage.dtype.itemsize // self.dtype.itemsize
        if count and (count > size or last >= size):
            raise ValueError(
                f'a tensor of shape {self.shape} claims {count} elements of a storage of {size}'
            )


@dataclass(frozen=True)
class OddTensor:
    """A tensor of a kind that weights are never of, such as 'sparse'."""

    kind: str


@dataclass
class ArrayDtype:
    """The dtype of a NumPy array, such as 'f8'."""

    code: str


@dataclass
class Array:
    """A NumPy array or scalar.

    Attributes:
        shape: Of the array; None for a scalar.
        dtype: Of its elements.
        data: Its elements, little-endian.
        fortran: Whether the first index changes fastest.
    """

    shape: tuple[int, ...] | None = (0,)
    dtype: ArrayDtype | None = None
    data: bytes = b''
    fortran: bool = False


@dataclass
class History:
    """The attributes of a ``HistoryBuffer`` of mmengine."""

    state: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Name:
    """A name that stands for itself and cannot be called."""

    text: str


@dataclass(frozen=True)
class Maker:
    """A name that may be called: what the table has for it."""

    text: str
    make: Callable


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------

_NUMERIC = re.compile(r'[<|=]?(b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,4})')


def _view(storage, offset, shape, stride, *_) -> TensorView | OddTensor:
    if not isinstance(storage, Storage):
        raise ValueError('a tensor without a storage')
    if storage.dtype is None:
        return OddTensor('quantized')
    return TensorView(storage, storage.dtype, offset, tuple(shape), tuple(stride))


def _typed_view(storage, offset, shape, stride, _requires_grad, _hooks, dtype, *_) -> TensorView:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError('a tensor without a storage or dtype')
    return TensorView(storage, dtype, offset, tuple(shape), tuple(stride))


def _parameter(data, *_) -> Any:
    if not isinstance(data, (TensorView, OddTensor)):
        raise ValueError('a parameter that is no tensor')
    return data


def _with_attributes(function, kind, arguments, _state) -> Any:
    """Return a tensor that had Python attributes without them."""
    if not isinstance(function, Maker):
        raise RefusedError('torch._tensor._rebuild_from_type_v2 of an unknown function')
    if kind not in (Name('torch.Tensor'), Maker('torch.nn.parameter.Parameter', _parameter)):
        return OddTensor('subclassed')
    return _parameter(function.make(*arguments))


def _odd(kind: str) -> Callable[..., OddTensor]:
    return lambda *_: OddTensor(kind)


def _brief(value: Any) -> str:
    """Return a text or number as it is, and of anything else the type: it may have no end."""
    return str(value)[:60] if isinstance(value, (str, int)) else type(value).__name__


def _keys(values: Iterable) -> list:
    """Return keys of a dict or items of a set, which are hashed: of nested ones without end.

    Raises:
        RefusedError: If one is not a text, a number or a flat tuple of these.
    """
    values = list(values)
    for value in values:
        for part in value if isinstance(value, tuple) else (value,):
            if part is not None and not isinstance(part, (str, bytes, int, float)):
                raise RefusedError(f'a key that is a {type(part).__name__}')
    return values


def _ordered(pairs=()) -> OrderedDict:
    pairs = list(pairs)
    return OrderedDict(zip(_keys(key for key, _ in pairs), (value for _, value in pairs)))


def _counter(counts=()) -> Counter:
    counts = dict(counts) if isinstance(counts, dict) else {}
    if not all(type(count) is int for count in counts.values()):
        raise ValueError('a Counter of other than numbers')
    return Counter(counts)


def _encode(text, encoding='utf-8') -> bytes:
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise RefusedError(f'_codecs.encode to {_brief(encoding)}')
    return text.encode('latin1')


def _bytearray(data=b'', *encoding) -> bytes:
    if isinstance(data, str):
        data = _encode(data, *encoding)
    if not isinstance(data, bytes):  # of a number, it would be so many zeros
        raise RefusedError(f'bytearray of {type(data).__name__}')
    return data


def _namespace(*arguments) -> argparse.Namespace:
    if arguments:
        raise RefusedError('argparse.Namespace with arguments')
    return argparse.Namespace()


def _dtype(code, *_) -> ArrayDtype:
    if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
        raise RefusedError(f'numpy.dtype of {_brief(code)}')
    return ArrayDtype(code.lstrip('<|='))


def _empty_array(*_) -> Array:
    return Array()  # BUILD fills it


def _scalar(dtype, data=b'') -> Array:
    if not isinstance(dtype, ArrayDtype) or not isinstance(data, bytes):
        raise ValueError('a malformed NumPy scalar')
    return Array(None, dtype, data)


def _attribute(owner, name) -> Name:
    """Stand for the methods that a pickled HistoryBuffer refers to."""
    of_history = isinstance(owner, History) or owner == _HISTORY
    if not of_history or not isinstance(name, str):
        raise RefusedError(f'getattr of {_brief(owner)}, which is not a HistoryBuffer')
    return Name(name)


def _history(*_) -> History:
    return History()


_HISTORY = Maker('mmengine.logging.history_buffer.HistoryBuffer', _history)

_MAKERS = {
    'torch._utils._rebuild_tensor': _view,
    'torch._utils._rebuild_tensor_v2': _view,
    'torch._utils._rebuild_tensor_v3': _typed_view,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch.nn.parameter.Parameter': _parameter,
    'torch._tensor._rebuild_from_type_v2': _with_attributes,
    'torch._utils._rebuild_qtensor': _odd('quantized'),
    'torch._utils._rebuild_sparse_tensor': _odd('sparse'),
    'torch._utils._rebuild_meta_tensor_no_storage': _odd('meta'),
    'torch._utils._rebuild_nested_tensor': _odd('nested'),
    'torch._utils._rebuild_wrapper_subclass': _odd('subclassed'),
    'torch._utils._rebuild_device_tensor_from_numpy': _odd('foreign'),
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': _odd('foreign'),
    'torch.serialization._get_layout': lambda *_: Name('layout'),
    'torch.Size': lambda sides=(): tuple(sides),
    'torch.device': lambda *parts: ':'.join(map(_brief, parts)),
    'collections.OrderedDict': _ordered,
    'collections.Counter': _counter,
    'builtins.set': lambda items=(): set(_keys(items)),
    'builtins.frozenset': lambda items=(): frozenset(_keys(items)),
    'builtins.slice': lambda *limits: slice(*limits),
    'builtins.complex': lambda real, imag: complex(float(real), float(imag)),
    'builtins.bytearray': _bytearray,
    'builtins.getattr': _attribute,
    '_codecs.encode': _encode,
    'argparse.Namespace': _namespace,
    'numpy.dtype': _dtype,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
    'numpy.core.multiarray._reconstruct': _empty_array,
    'numpy._core.multiarray._reconstruct': _empty_array,
}
_TABLE = {name: Maker(name, make) for name, make in _MAKERS.items()} | {_HISTORY.text: _HISTORY}
_TABLE |= {name: Name(name) for name in ('torch.Tensor', 'numpy.ndarray')}
_TABLE |= {
    f'torch.per_{by}': Name(by)
    for by in ('tensor_affine', 'tensor_symmetric', 'channel_affine', 'channel_symmetric')
}

# by the names of torch's storage classes
STORAGES = {
    f'torch.{name}Storage': getattr(torch, dtype)
    for name, dtype in (
        ('Double', 'float64'),
        ('Float', 'float32'),
        ('Half', 'float16'),
        ('BFloat16', 'bfloat16'),
        ('Long', 'int64'),
        ('Int', 'int32'),
        ('Short', 'int16'),
        ('Char', 'int8'),
        ('Byte', 'uint8'),
        ('Bool', 'bool'),
        ('ComplexDouble', 'complex128'),
        ('ComplexFloat', 'complex64'),
    )
}
STORAGES['torch.storage.UntypedStorage'] = torch.uint8
_QUANTIZED = {
    f'torch.{name}Storage' for name in ('QInt8', 'QUInt8', 'QInt32', 'QUInt4x2', 'QUInt2x4')
}


def _looked_up(module: str, name: str) -> Any:
    """Return what the table has for a name.

    Raises:
        RefusedError: If it has nothing.
    """
    full = f'{IMPORT_MAPPING.get(module, module)}.{name}'
    full = full.replace('torch.cuda.', 'torch.', 1)
    if full in _TABLE:
        return _TABLE[full]
    if full in STORAGES or full in _QUANTIZED:
        return Name(full)
    if module == 'torch':
        value = getattr(torch, name, None)
        if isinstance(value, torch.dtype):
            return value
    raise RefusedError(f'GLOBAL {full}')


# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------


def parse(stream: BinaryIO, size: int) -> Any:
    """Return what a pickle describes, reading up to its end and no further.

    Args:
        stream: A BytesIO or mmap, whose reads return what is there and not more.
        size: Bytes in it, more than which is not copied.

    Raises:
        RefusedError: If the pickle needs something that is not in the table.
        Exception: Of several kinds, if it is damaged.
    """
    return _Machine(_MARGIN + size).run(stream)


class _Machine:
    def __init__(self, limit: int):
        self.limit = limit
        self.copied = 0
        self.stack: list = []
        self.below: list[list] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_OPERATIONS:
                raise RefusedError(f'more than {_MAX_OPERATIONS} operations')
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name != 'STOP':
                method = _OPERATIONS.get(name)
                if method is None:
                    raise RefusedError(f'the operation {name}')
                method(self, argument)
        return self.stack.pop()

    def _popped_to_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _global(self, argument: str) -> None:
        self.stack.append(_looked_up(*argument.split(' ', 1)))

    def _stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError('a name that is no text')
        self.stack.append(_looked_up(module, name))

    def _call(self, _) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise RefusedError(f'a call of {getattr(maker, "text", type(maker).__name__)}')
        self.copied += sum(len(part) for part in arguments if isinstance(part, Sized))
        if self.copied > self.limit:
            raise RefusedError('calls that copy the same text again and again')
        self.stack.append(maker.make(*arguments))

    def _build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OrderedDict):
            return  # the metadata of a state dict
        if isinstance(target, (argparse.Namespace, History)):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise ValueError('malformed attributes')
            attributes = target.state if isinstance(target, History) else vars(target)
            attributes.update(state)
        elif isinstance(target, ArrayDtype):
            # version, byte order, sub-array, names, fields, size, alignment, flags
            if state[1] == '>' or any(part is not None for part in state[2:5]):
                raise RefusedError('numpy.dtype of other than plain little-endian numbers')
        elif isinstance(target, Array) and target.dtype is None:
            _, shape, dtype, target.fortran, data = state
            if not isinstance(dtype, ArrayDtype) or not isinstance(data, bytes):
                raise RefusedError('a NumPy array of other than plain numbers')
            target.shape, target.dtype, target.data = tuple(shape), dtype, data
        else:
            raise RefusedError(f'attributes set on {type(target).__name__}')

    def _persistent(self, _) -> None:
        kind, storage_type, key, location, size, *view = self.stack.pop()
        if kind != 'storage' or any(view):
            raise RefusedError(f'a reference to a {_brief(kind)}')
        malformed = not isinstance(key, (str, int)) or not isinstance(location, str)
        if malformed or not isinstance(storage_type, Name) or type(size) is not int or size < 0:
            raise ValueError('a malformed storage')
        if storage_type.text not in _QUANTIZED and storage_type.text not in STORAGES:
            raise RefusedError(f'a storage of {storage_type.text}')
        dtype = STORAGES.get(storage_type.text)
        self.stack.append(Storage(str(key), dtype, size, location))

    def _append(self, _) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, _) -> None:
        self._extend(self._popped_to_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError('items appended to something that is no list')
        self.stack[-1].extend(items)

    def _add_items(self, _) -> None:
        items = self._popped_to_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError('items added to something that is no set')
        self.stack[-1].update(_keys(items))

    def _set_item(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self, _) -> None:
        self._update(self._popped_to_mark())

    def _update(self, items: list) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError('items set in something that is no dict')
        self.stack[-1].update(zip(_keys(items[::2]), items[1::2]))

    def _gather(self, make: Callable[[list], Any]) -> None:
        items = self._popped_to_mark()  # from here on, another stack
        self.stack.append(make(items))

    def _put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def _tuple(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))


_LITERALS = frozenset(
    'BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES '
    'SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINSTRING SHORT_BINSTRING'.split()
)
_EMPTY = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list,
    'EMPTY_DICT': dict,
    'EMPTY_SET': set,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    'PROTO': lambda machine, _: None,
    'FRAME': lambda machine, _: None,
    'MARK': _Machine._mark,
    'GLOBAL': _Machine._global,
    'STACK_GLOBAL': _Machine._stack_global,
    'REDUCE': _Machine._call,
    'NEWOBJ': _Machine._call,
    'BUILD': _Machine._build,
    'BINPERSID': _Machine._persistent,
    'APPEND': _Machine._append,
    'APPENDS': _Machine._appends,
    'ADDITEMS': _Machine._add_items,
    'SETITEM': _Machine._set_item,
    'SETITEMS': _Machine._set_items,
    'TUPLE': lambda machine, _: machine._gather(tuple),
    'TUPLE1': lambda machine, _: machine._tuple(1),
    'TUPLE2': lambda machine, _: machine._tuple(2),
    'TUPLE3': lambda machine, _: machine._tuple(3),
    'BINPUT': _Machine._put,
    'LONG_BINPUT': _Machine._put,
    'MEMOIZE': lambda machine, _: machine._put(len(machine.memo)),
    'BINGET': lambda machine, place: machine.stack.append(machine.memo[place]),
    'LONG_BINGET': lambda machine, place: machine.stack.append(machine.memo[place]),
    'FROZENSET': lambda machine, _: machine._gather(lambda items: frozenset(_keys(items))),
    'POP': lambda machine, _: machine.stack.pop(),
    'POP_MARK': lambda machine, _: machine._popped_to_mark(),
}
