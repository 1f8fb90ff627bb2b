"""What files hold: torch's archives, its older format, and safetensors, read without executing.

torch's own restricted reader (``weights_only=True``) reads the first two. Whatever an archive
claims is held against its size before that, and checksums are verified where the format has them:
archives do, member by member; the older format and safetensors do not. For those, and for any other
file, ``FILE.sha256`` beside it is verified if it is there.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from . import restricted_unpickler, stand_ins
from .errors import CheckpointError, shown

_CHUNK = 1 << 22
# What the pickles of a file may have beside its weights: operations, of which 400 000 make objects
# of 100 MB at most, and bytes. A training of 1500 parameters in groups of their own, with an
# average and AdamW, takes 270 000 operations; logs of 160 000 iterations take 3.4 MB a scalar.
_OPERATIONS = 400_000
_BYTES_PER_OPERATION = 512
_PICKLE = 1 << 28
#: What is added to the name of a file for that of its checksum.
CHECKSUM_SUFFIX = '.sha256'

MapLocation = Union[str, torch.device, Mapping[str, str], Callable, None]


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
    map_location = 'cpu' if map_location is None else map_location
    if path.suffix != '.safetensors':
        return _explained(path, lambda: _load_torch(path, map_location))
    if not isinstance(map_location, (str, torch.device)):
        raise ValueError(f'map_location must be a device or None for {path}, got {map_location!r}')
    load_file = _safetensors_reader()
    return _explained(path, lambda: load_file(path, device=str(map_location)))


def outline(path: Path) -> Any:
    """Return what a file of torch's holds, its tensors for a look at their shapes.

    The weights of an archive are mapped from the file, and their checksums are not verified
    (:func:`damage` does that).

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: As :func:`load`.
    """
    require_file(path)
    return _explained(path, lambda: _load_torch(path, 'cpu', mapped=True))


def damage(path: Path) -> str | None:
    """Return what is wrong with an archive, by its own checksums, if anything is."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # noqa: BLE001 - damage shows in many ways
        return f'damaged: {error}'
    return f'damaged: the checksum of {shown(bad)} is wrong' if bad else None


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
    except Exception as error:  # noqa: BLE001 - damage shows in many ways, all the same to a user
        refused = _refused(error)
        if refused:
            raise CheckpointError(
                f'{path} holds more than weights and was not read, since reading all of it could '
                f'execute code: {refused}\nIf you trust whoever made it, read it as torch does: '
                f'unsafe:{path}'
            ) from error
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is damaged, truncated or not a checkpoint: '
            f'{type(error).__name__}: {shown(reason, 200)}. Delete it and get it again'
        ) from error


def _refused(error: Exception) -> str | None:
    """Return the line of torch's long explanation that names what was refused, if anything was."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    marks = ('GLOBAL', 'getattr', 'unrecognized function', 'Can only')
    lines = (line.strip() for line in str(error).splitlines())
    return next((shown(line, 200) for line in lines if any(mark in line for mark in marks)), None)


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


def _load_torch(path: Path, map_location: MapLocation, mapped: bool = False) -> Any:
    if restricted_unpickler.is_archive(path):
        _check_archive(path, with_weights=not mapped)
    else:
        _check_older(path)
    content = restricted_unpickler.load(path, map_location, stand_ins.STAND_INS, mapped)
    return stand_ins.rebuilt(content)


def _check_archive(path: Path, with_weights: bool) -> None:
    """Check that an archive is torch's, claims no more than it has, and is not damaged.

    Args:
        path: The file.
        with_weights: Whether to verify the checksums of all members, or of all but the weights.

    Raises:
        CheckpointError: If not.
        ValueError: If the archive is not torch's.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(
                    f'has a compressed member, {shown(info.filename)} ({info.file_size} bytes once '
                    'inflated): torch writes none, and it was not read. Unpack the archive and '
                    'pack it again without compression if it is yours'
                )
        names = {info.filename for info in infos}
        claimed = sum(info.file_size for info in infos)
        if claimed > size or len(names) < len(infos):
            raise CheckpointError(
                f'has {size} bytes and claims {len(infos)} members of {claimed} bytes: '
                'it was not read'
            )
        roots = [name.removesuffix('data.pkl') for name in names if name.endswith('/data.pkl')]
        if len(roots) != 1:
            raise ValueError('no archive of torch.save')
        if f'{roots[0]}constants.pkl' in names:
            raise CheckpointError('is a TorchScript archive, not a checkpoint')
        pickled = archive.getinfo(f'{roots[0]}data.pkl').file_size
        _require_in_proportion(size, pickled)
        _count_operations(io.BytesIO(archive.read(f'{roots[0]}data.pkl')), 1, size)
        for info in infos:
            if with_weights or not info.filename.startswith(f'{roots[0]}data/'):
                with archive.open(info) as member:  # which verifies the checksum at its end
                    while member.read(_CHUNK):
                        pass


def _check_older(path: Path) -> None:
    """Check that the pickles of a file in torch's older format make no more than weights do."""
    size = path.stat().st_size
    with (
        open(path, 'rb') as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        # magic number, protocol, machine, the object, and the keys of what follows
        _count_operations(mapped, 5, size)
        _require_in_proportion(size, mapped.tell())


def _require_in_proportion(size: int, pickled: int) -> None:
    if pickled > _PICKLE + (size - pickled):
        raise CheckpointError(
            f'has {pickled} bytes of a pickle beside {size - pickled} of weights: checkpoints have '
            'far fewer, and it was not read'
        )


def _count_operations(stream: io.BytesIO | mmap.mmap, pickles: int, size: int) -> None:
    """Check, executing nothing, that pickles have no more operations than a file of that size."""
    most = _OPERATIONS + size // _BYTES_PER_OPERATION
    count = 0
    for _ in range(pickles):
        for _ in pickletools.genops(stream):
            count += 1
            if count > most:
                raise CheckpointError(
                    f'has {size} bytes and a pickle of more than {most} operations: checkpoints of '
                    'that size have far fewer, and it was not read'
                )


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
