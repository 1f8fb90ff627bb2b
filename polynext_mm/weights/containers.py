"""What files hold: torch's archives, its older format, and safetensors, read without executing.

Whatever a file claims is held against its size before memory is taken, and checksums are verified
where the format has them: archives do, member by member; the older format and safetensors do not.
For those, and for any other file, ``FILE.sha256`` beside it is verified if it is there.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import io
import mmap
import os
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import pickles
from .errors import CheckpointError, shown
from .pickles import Array, ArrayDtype, History, Maker, Name, OddTensor, Storage, TensorView

_CHUNK = 1 << 22
# torch's older format begins with these two pickles
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_DEPTH = 64
_MAX_VALUES = 2_000_000
#: What is added to the name of a file for that of its checksum.
CHECKSUM_SUFFIX = '.sha256'

MapLocation = str | torch.device | Mapping[str, str] | Callable | None


def load(path: Path, map_location: MapLocation = 'cpu') -> Any:
    """Return what a file holds, in plain values and tensors.

    Besides numbers, texts, lists, dicts and tensors that may be an ``argparse.Namespace``, NumPy
    arrays and scalars, and mmengine's ``HistoryBuffer``.

    Args:
        path: The file; safetensors if its name says so.
        map_location: As for ``torch.load``, except that None is the CPU; for .safetensors a device
            or None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, claims more than it has, or needs code to be executed.
        ImportError: If it is .safetensors and safetensors is not installed.
        ValueError: If it is .safetensors and ``map_location`` is not a device or None.
    """
    require_file(path)
    if path.suffix == '.safetensors':
        if not isinstance(map_location, (str, torch.device, type(None))):
            raise ValueError(
                f'map_location must be a device or None for {path}, got {map_location!r}'
            )
        load_file = _safetensors_reader()
        return _explained(path, lambda: load_file(path, device=str(map_location or 'cpu')))
    return _explained(
        path, lambda: _load_torch(path, 'cpu' if map_location is None else map_location)
    )


def outline(path: Path) -> Any:
    """Return what a file of torch's holds, with tensors on the meta device, reading no weights.

    Checksums of what is read are verified; those of the weights are for :func:`damage` to verify.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: As :func:`load`.
    """
    require_file(path)
    return _explained(path, lambda: _load_torch(path, 'meta'))


def damage(path: Path) -> str | None:
    """Return what is wrong with an archive, by its own checksums, if anything is."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # noqa: BLE001 - damage shows in many ways
        return f'damaged: {error}'
    return f'damaged: the checksum of {bad} is wrong' if bad else None


def require_file(path: Path) -> None:
    """Check that there is a file.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {path}: check the path (relative paths start at {Path.cwd()})'
        )


def _explained(path: Path, read: Callable[[], Any]) -> Any:
    """Return what ``read`` does, with an explanation of what is refused or damaged."""
    _verify_checksum(path)
    try:
        return read()
    except CheckpointError as error:
        raise CheckpointError(f'{path} {error}') from error
    except pickles.RefusedError as error:
        raise CheckpointError(
            f'{path} holds more than weights and was not read, since reading all of it could '
            f'execute code: {shown(error)}\nIf you trust whoever made it, read it as torch does: '
            f'unsafe:{path}'
        ) from error
    except Exception as error:  # damage shows in many ways, all the same to a user
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is damaged, truncated or not a checkpoint: '
            f'{type(error).__name__}: {shown(reason)}. Delete it and get it again'
        ) from error


# ------------------------------------------------------------------------------------------------
# Checksums beside files
# ------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """Return where the checksum of a file is, in the format of the program sha256sum."""
    return path.with_name(path.name + CHECKSUM_SUFFIX)


def _verify_checksum(path: Path) -> None:
    beside = checksum_path(path)
    if not beside.is_file():
        return
    with open(beside, 'rb') as file:
        expected = (file.read(4096).decode(errors='replace').split() or [''])[0].lower()
    if expected != sha256_of(path):
        raise CheckpointError(
            f'{path} is not the file that {beside.name} is of: get it again, or remove '
            f'{beside.name} if {path.name} was changed on purpose'
        )


# ------------------------------------------------------------------------------------------------
# torch's two formats
# ------------------------------------------------------------------------------------------------


def _load_torch(path: Path, map_location: MapLocation) -> Any:
    with open(path, 'rb') as file:
        is_archive = file.read(4) == b'PK\x03\x04'
    return (_load_archive if is_archive else _load_older)(path, map_location)


def _load_archive(path: Path, map_location: MapLocation) -> Any:
    with zipfile.ZipFile(path) as archive:
        members, root = _members(archive, path.stat().st_size)
        if f'{root}byteorder' in members and archive.read(f'{root}byteorder') != b'little':
            raise CheckpointError('was written on a big-endian machine and cannot be read')
        pickled = archive.read(f'{root}data.pkl')
        described = pickles.parse(io.BytesIO(pickled), len(pickled))

        def read_storage(storage: Storage) -> Tensor:
            info = members.get(f'{root}data/{storage.key}')
            if info is None:
                raise ValueError(f'no member data/{storage.key}')
            if info.file_size != storage.size * storage.dtype.itemsize:
                raise ValueError(f'data/{storage.key} has {info.file_size} bytes')
            with archive.open(info) as member:
                return _read_into(member, info.file_size)

        return _Builder(read_storage, map_location, len(pickled)).build(described)


def _members(archive: zipfile.ZipFile, size: int) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the members of a torch archive by name, and the folder that they are in.

    Raises:
        CheckpointError: If a member is deflated, or all together are larger than the file.
        ValueError: If the archive is not torch's.
    """
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(
                f'has a compressed member, {shown(info.filename)} ({info.file_size} bytes once inflated): '
                'torch writes none, and it was not read. Unpack the archive and pack it again '
                'without compression if it is yours'
            )
    claimed = sum(info.file_size for info in infos)
    if claimed > size or len(members) < len(infos):
        raise CheckpointError(
            f'has {size} bytes and claims {len(infos)} members of {claimed} bytes: it was not read'
        )
    pickled = [name for name in members if name.endswith('/data.pkl')]
    if len(pickled) != 1:
        raise ValueError('no archive of torch.save')
    root = pickled[0].removesuffix('data.pkl')
    if f'{root}constants.pkl' in members:
        raise CheckpointError('is a TorchScript archive, not a checkpoint')
    return members, root


def _load_older(path: Path, map_location: MapLocation) -> Any:
    size = path.stat().st_size
    if not size:
        raise ValueError('it is empty')
    with (
        open(path, 'rb') as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        if file.read(1) != b'\x80':
            raise ValueError('neither an archive nor a pickle')
        if (pickles.parse(mapped, size), pickles.parse(mapped, size)) != (_MAGIC_NUMBER, _PROTOCOL):
            raise ValueError('not written by torch.save')
        machine = pickles.parse(mapped, size)
        if machine.get('little_endian') is not True:
            raise CheckpointError('was written on a big-endian machine and cannot be read')
        described = pickles.parse(mapped, size)
        keys = pickles.parse(mapped, size)
        _Builder(None, 'meta', size).build(described)  # refuses what has no dtype to count by
        storages = {storage.key: storage for storage in _storages(described)}
        if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
            raise ValueError('a malformed list of storages')
        places = _places(mapped, [str(key) for key in keys], storages, size)

        def read_storage(storage: Storage) -> Tensor:
            file.seek(places[storage.key])
            return _read_into(file, storage.size * storage.dtype.itemsize)

        return _Builder(read_storage, map_location, size).build(described)


def _places(
    mapped: mmap.mmap, keys: list[str], storages: Mapping[str, Storage], size: int
) -> dict[str, int]:
    """Return where the numbers of each storage start in a file of the older format.

    Raises:
        ValueError: If they are not all there.
    """
    if sorted(keys) != sorted(storages):
        raise ValueError('its list of storages is not that of its tensors')
    places, place = {}, mapped.tell()
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(mapped[place : place + 8], 'little')
        places[key] = place + 8
        if count != storage.size:
            raise ValueError(f'a storage of {count} elements instead of {storage.size}')
        place += 8 + count * storage.dtype.itemsize
        if place > size:
            raise ValueError('it ends within its tensors')
    return places


def _storages(described: Any) -> Iterator[Storage]:
    """Yield the storages of all tensors in a description."""
    pending, seen = [described], set()
    while pending:
        value = pending.pop()
        if isinstance(value, TensorView):
            yield value.storage
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, argparse.Namespace):
            pending.extend(vars(value).values())


def _read_into(file: BinaryIO, size: int) -> Tensor:
    """Return the next ``size`` bytes of a file as a tensor of bytes, the checksum verified."""
    data = torch.empty(size, dtype=torch.uint8)
    view = memoryview((ctypes.c_char * size).from_address(data.data_ptr())).cast('B')
    done = 0
    while done < size:
        count = file.readinto(view[done : done + _CHUNK])
        if not count:
            raise ValueError('it ends within a tensor')
        done += count
    file.read(1)  # a member of an archive verifies its checksum at its end
    return data


# ------------------------------------------------------------------------------------------------
# From descriptions to values
# ------------------------------------------------------------------------------------------------


class _Builder:
    """Turns descriptions into values.

    Args:
        read_storage: Reads the bytes of a storage.
        map_location: Where tensors go; of 'meta', no storage is read.
        limit: How many bytes arrays may have together.
    """

    def __init__(
        self,
        read_storage: Callable[[Storage], Tensor] | None,
        map_location: MapLocation,
        limit: int,
    ):
        self.read_storage = read_storage
        self.map_location = map_location
        self.limit = limit
        self.storages: dict[str, Tensor] = {}
        self.values = 0

    def build(self, value: Any, path: tuple = ()) -> Any:
        self.values += 1
        if len(path) > _MAX_DEPTH or self.values > _MAX_VALUES:
            raise CheckpointError('holds values nested without end: it was not read')
        if isinstance(value, (OrderedDict, dict)):
            built = {key: self.build(item, (*path, key)) for key, item in value.items()}
            return built if type(value) is dict else type(value)(built)
        if isinstance(value, (list, tuple)):
            items = [self.build(item, (*path, place)) for place, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self.build(vars(value), path))
        if isinstance(value, TensorView):
            return self._tensor(value)
        if isinstance(value, OddTensor):
            raise CheckpointError(
                f'holds a {value.kind} tensor, {_where(path)}: weights are dense, on '
                'the CPU and in floating point'
            )
        if isinstance(value, Array):
            return self._array(value)
        if isinstance(value, ArrayDtype):
            return value.code
        if isinstance(value, History):
            return self._history(value, path)
        if isinstance(value, (Name, Maker, Storage)):
            raise pickles.RefusedError(f'{getattr(value, "text", "a storage")} as {_where(path)}')
        return value

    def _tensor(self, view: TensorView) -> Tensor:
        if self.map_location == 'meta':
            return torch.empty(view.shape, dtype=view.dtype, device='meta')
        storage = view.storage
        if storage.key not in self.storages:
            self.storages[storage.key] = _placed(
                self.read_storage(storage), storage.location, self.map_location
            )
        data = self.storages[storage.key]
        return torch.empty(0, dtype=view.dtype, device=data.device).set_(
            data.untyped_storage(), view.offset, view.shape, view.stride
        )

    def _array(self, array: Array) -> Any:
        if array.dtype is None:
            raise ValueError('a NumPy array without a dtype')
        self.limit -= len(array.data)
        if self.limit < 0:
            raise CheckpointError('holds the same array again and again: it was not read')
        if importlib.util.find_spec('numpy') is None:
            dtype = {'f8': torch.float64, 'f4': torch.float32}.get(array.dtype.code, torch.int64)
            values = torch.frombuffer(bytearray(array.data), dtype=dtype)
            return values if array.shape is not None else values[0].item()
        import numpy as np

        values = np.frombuffer(array.data, np.dtype(array.dtype.code))
        if array.shape is None:
            (scalar,) = values
            return scalar
        return values.reshape(array.shape, order='F' if array.fortran else 'C').copy()

    def _history(self, history: History, path: tuple) -> Any:
        state = {
            key: self.build(history.state[key], (*path, key))
            for key in ('_log_history', '_count_history', 'max_length')
        }
        if importlib.util.find_spec('mmengine') is None:
            return BareHistory(**state)
        from mmengine.logging import HistoryBuffer

        values, counts, length = state.values()
        if type(length) is not int or any(
            getattr(array, 'ndim', 0) != 1 or array.dtype.kind not in 'biuf'
            for array in (values, counts)
        ):
            raise ValueError('a malformed HistoryBuffer')
        return HistoryBuffer(values, counts, length)


def _where(path: tuple) -> str:
    return shown('.'.join(map(shown, path)))


class BareHistory(argparse.Namespace):
    """The attributes of a ``HistoryBuffer`` in a file, read where mmengine is not installed."""


def _placed(data: Tensor, location: str, map_location: MapLocation) -> Tensor:
    """Return the bytes of a storage where ``map_location`` says, as ``torch.load`` takes it."""
    if callable(map_location):
        storage = map_location(data.untyped_storage(), location)
        if storage is None:
            return data
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    if isinstance(map_location, Mapping):
        map_location = map_location.get(location, 'cpu')
    return data.to(map_location)


def _safetensors_reader() -> Callable[..., dict[str, Tensor]]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            'reading a .safetensors file needs safetensors: run `pip install safetensors`',
            name=error.name,
        ) from error
    return load_file


# ------------------------------------------------------------------------------------------------
# Looking into files that are not ours to read
# ------------------------------------------------------------------------------------------------


def texts(path: str | os.PathLike) -> Iterator[str]:
    """Yield every text in the pickles of a file, up to where it is not one."""
    try:
        with (
            open(path, 'rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            streams = [mapped] * 4  # magic number, protocol, machine, then the object
            if mapped[:4] == b'PK\x03\x04':
                with zipfile.ZipFile(file) as archive:
                    streams = [
                        io.BytesIO(archive.read(info))
                        for info in archive.infolist()
                        if info.filename.endswith('data.pkl')
                        and info.compress_type == zipfile.ZIP_STORED
                    ]
            for stream in streams:
                for _, argument, _ in pickletools.genops(stream):
                    if isinstance(argument, str):
                        yield argument
    except Exception:  # noqa: BLE001 - whatever a foreign file does to the parser, it is not ours
        return


def is_truncated_archive(path: Path) -> bool:
    """Return whether a file begins as torch's archives do and lacks their end."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'
