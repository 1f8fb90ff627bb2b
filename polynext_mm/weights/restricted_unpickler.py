"""torch's restricted reader, and an equivalent for files that it cannot read.

``torch.load(weights_only=True)`` reads only pickles of protocol 2. Up to torch 2.5 crafted files
can execute code (CVE-2025-32434), and before 2.5 it cannot allow further classes by name. For other
protocols, and with such a torch, this module reads the same two formats and refuses what torch's
reader refuses: it interprets only the operations, functions and classes that weights need.
"""

from __future__ import annotations

import _codecs
import _compat_pickle
import collections
import mmap
import os
import pickle
import struct
import tarfile
import types
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..compat.torch_features import SAFE_READER


def load(path: Path, map_location: Any, allowed: Sequence[Any], mapped: bool = False) -> Any:
    """Read a file of ``torch.save``, executing only what is allowed.

    Args:
        path: The file, in torch's present or older format.
        map_location: As for ``torch.load``.
        allowed: Classes and functions besides those that weights need, or pairs of one and the name
            that it replaces, as for ``torch.serialization.safe_globals``.
        mapped: Whether to map the weights of an archive into memory instead of reading them.

    Raises:
        pickle.UnpicklingError: If the file needs anything else.
        Exception: Of many kinds, if the file is damaged.
    """
    if not SAFE_READER.is_there or _protocol(path) > 2:
        return load_restricted(path, map_location, allowed, mapped)
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(
            path, map_location=map_location, weights_only=True, mmap=mapped and is_archive(path)
        )


def load_restricted(
    path: Path, map_location: Any, allowed: Sequence[Any], mapped: bool = False
) -> Any:
    """Read as :func:`load` does, but always with the reader of this module."""
    names = {**_FOR_WEIGHTS, **dict(map(_with_name, allowed))}
    unpickler = type('_', (_Unpickler,), {'allowed': names, 'size': os.path.getsize(path)})
    module = types.SimpleNamespace(
        __name__=__name__,
        Unpickler=unpickler,
        load=lambda file, **options: unpickler(file, **options).load(),
    )
    with open(path, 'rb') as file:
        if is_archive(path):
            records = _Records(file, mapped)
            return torch.serialization._load(records, map_location, module, encoding='utf-8')
        if not file.read(512).strip(b'\0'):  # which tarfile takes for an empty archive
            raise EOFError('it begins with zeros')
        file.seek(0)
        if tarfile.is_tarfile(path):  # torch would unpack it into files
            raise pickle.UnpicklingError("Can only read torch's own formats, not a tar archive")
        return torch.serialization._legacy_load(file, map_location, module, encoding='utf-8')


def _protocol(path: Path) -> int:
    """Return the protocol of a file's pickles, or 0 if they do not begin with one."""
    if is_archive(path):
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith('/data.pkl')), None)
            start = archive.open(name).read(2) if name else b''
    else:
        with open(path, 'rb') as file:
            start = file.read(2)
    return start[1] if start[:1] == pickle.PROTO and len(start) == 2 else 0


def is_archive(path: Path) -> bool:
    """Return whether a file begins as torch's present format does, and not as the older one."""
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


def _with_name(allowed: Any) -> tuple[str, Any]:
    if isinstance(allowed, tuple):
        return allowed[1], allowed[0]
    return f'{allowed.__module__}.{allowed.__qualname__}', allowed


# What torch's reader allows. This includes kinds of tensors that weights never have,
# so that they can be refused by name.
_FOR_WEIGHTS: Mapping[str, Any] = {
    '_codecs.encode': _codecs.encode,  # protocol 2 writes bytes with it
    'builtins.bytearray': bytearray,
    'builtins.complex': complex,
    'builtins.set': set,
    'collections.Counter': collections.Counter,
    'collections.OrderedDict': collections.OrderedDict,
    'torch.Size': torch.Size,
    'torch.Tensor': torch.Tensor,
    **{
        f'torch._utils.{name}': getattr(torch._utils, name)
        for name in (
            '_rebuild_meta_tensor_no_storage',
            '_rebuild_parameter',
            '_rebuild_qtensor',
            '_rebuild_sparse_tensor',
            '_rebuild_tensor',
            '_rebuild_tensor_v2',
        )
    },
    'torch.device': torch.device,
    'torch.nn.parameter.Parameter': torch.nn.Parameter,
    'torch.serialization._get_layout': torch.serialization._get_layout,
    'torch.storage.UntypedStorage': torch.UntypedStorage,
    **{
        str(value): value
        for value in vars(torch).values()
        if isinstance(value, (torch.dtype, torch.qscheme))
    },
}
_CHUNK = 1 << 22
_NEVER_CALLED = (torch.UntypedStorage, torch.Tensor)  # they take a size and claim as much memory
_OPERATIONS = (
    'APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD '
    'EMPTY_DICT EMPTY_LIST EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK '
    'NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 '
    'TUPLE2 TUPLE3 '
    # of protocols 3 to 5
    'ADDITEMS BINBYTES BINBYTES8 BINUNICODE8 BYTEARRAY8 FRAME FROZENSET LONG4 MEMOIZE '
    'SHORT_BINBYTES SHORT_BINUNICODE STACK_GLOBAL'
).split()


_InPython: Any = pickle._Unpickler  # its stack and methods are missing from the types of Python


class _Unpickler(_InPython):
    """Interprets the same operations as torch's restricted reader, under the same conditions.

    ``allowed`` is what the file may name, ``size`` its number of bytes.
    """

    allowed: Mapping[str, Any]
    size: int

    class _Dispatch(dict):
        def __missing__(self, operation: int) -> Any:
            raise pickle.UnpicklingError(f'Unsupported operand {operation}')

    dispatch = _Dispatch(
        (code, pickle._Unpickler.dispatch[code])
        for code in (getattr(pickle, name)[0] for name in _OPERATIONS)
    )

    def find_class(self, module: str, name: str) -> Any:
        # protocol 2 has the names of Python 2
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f'{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}'
        if full not in self.allowed:
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full} is not allowed')
        return self.allowed[full]

    def _require(self, condition: bool, rule: str, value: Any) -> None:
        if not condition:
            raise pickle.UnpicklingError(f'Can only {rule}, but got {value!r:.100}')

    def _is_allowed(self, value: Any) -> bool:
        return any(value is other for other in self.allowed.values())

    def load_reduce(self) -> None:
        function = self.stack[-2]
        known = self._is_allowed(function) and function not in _NEVER_CALLED
        self._require(known, 'call what is allowed', function)
        super().load_reduce()

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        known = isinstance(kind, type) and self._is_allowed(kind) and kind not in _NEVER_CALLED
        self._require(known, 'create what is allowed', kind)
        self.append(kind.__new__(kind, *args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is torch.Tensor:
            target.set_(*state)
        elif type(target) is collections.OrderedDict:
            vars(target).update(state)
        else:
            self._require(self._is_allowed(type(target)), 'build what is allowed', target)
            if hasattr(target, '__setstate__'):
                target.__setstate__(state)
            else:
                vars(target).update(state)

    def load_append(self) -> None:
        self._require(type(self.stack[-2]) is list, 'append to lists', type(self.stack[-2]))
        super().load_append()

    def load_appends(self) -> None:
        target = self.metastack[-1][-1]
        self._require(type(target) is list, 'append to lists', type(target))
        super().load_appends()

    def load_additems(self) -> None:
        target = self.metastack[-1][-1]
        self._require(type(target) is set, 'add items to sets', type(target))
        super().load_additems()

    def load_setitem(self) -> None:
        self._require_dict(self.stack[-3])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._require_dict(self.metastack[-1][-1])
        super().load_setitems()

    def _require_dict(self, target: Any) -> None:
        kinds = (dict, collections.OrderedDict, collections.Counter)
        self._require(type(target) in kinds, 'set items of dicts', type(target))

    def load_binpersid(self) -> None:
        reference = self.stack[-1]
        is_storage = isinstance(reference, tuple) and reference[:1] in (('storage',), (b'storage',))
        self._require(is_storage, 'refer to a storage', reference)
        elements = reference[4] * getattr(reference[1], 'dtype', torch.uint8).itemsize
        if not 0 <= elements <= self.size:
            raise ValueError(f'a storage of {elements} bytes in a file of {self.size}')
        super().load_binpersid()

    for _name in (
        'REDUCE',
        'NEWOBJ',
        'BUILD',
        'APPEND',
        'APPENDS',
        'SETITEM',
        'SETITEMS',
        'ADDITEMS',
    ):
        dispatch[getattr(pickle, _name)[0]] = locals()[f'load_{_name.lower()}']
    dispatch[pickle.BINPERSID[0]] = load_binpersid


class _Records:
    """The members of a torch archive, with the interface of torch's own reader.

    Unlike that, this checks the number of bytes that a storage claims.
    """

    def __init__(self, file: BinaryIO, mapped: bool):
        self.archive = zipfile.ZipFile(file)
        names = [name for name in self.archive.namelist() if name.endswith('/data.pkl')]
        if len(names) != 1:
            raise ValueError('no archive of torch.save')
        self.root = names[0][: -len('data.pkl')]
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def has_record(self, name: str) -> bool:
        return self.root + name in self.archive.namelist()

    def get_record(self, name: str) -> bytes:
        return self.archive.read(self.root + name)

    def serialization_id(self) -> str:
        return ''

    def get_storage_from_record(self, name: str, size: int, kind: type) -> Tensor:
        member = self.archive.getinfo(self.root + name)
        if member.file_size != size or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'a storage of {size} bytes in a member of {member.file_size}')
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if self.map is None:
            return torch.frombuffer(self._content(member), dtype=torch.uint8)
        lengths = struct.unpack_from('<HH', self.map, member.header_offset + 26)
        start = member.header_offset + 30 + sum(lengths)
        return torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=start)

    def _content(self, member: zipfile.ZipInfo) -> bytearray:
        """Return the bytes of a member without ever holding a second copy."""
        content, start = bytearray(member.file_size), 0
        with self.archive.open(member) as stream:
            while chunk := stream.read(_CHUNK):
                content[start : start + len(chunk)] = chunk
                start += len(chunk)
        return content
