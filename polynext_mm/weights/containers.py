"""Read torch's archives, its older format, and safetensors, without executing anything.

torch's restricted reader (``weights_only=True``) reads the first two. Checksums are verified where
the format has them: archives do, member by member; the older format and safetensors do not. For
those, and for any other file, ``FILE.sha256`` beside it is verified if it is there.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from . import restricted_unpickler, stand_ins
from .errors import CheckpointError, shown
from .files import checksum_path, sha256_of

MapLocation = Union[str, torch.device, dict[str, str], Callable, None]

# raised if this torch or this package lacks a feature, which is no sign of damage
_NOT_THERE = (AttributeError, ImportError, NotImplementedError)


def load(path: Path, map_location: MapLocation = 'cpu') -> Any:
    """Return the content of a file as plain values and tensors.

    Besides numbers, strings, lists, dicts and tensors, it may hold an ``argparse.Namespace``, NumPy
    arrays and scalars, paths, dates, and mmengine's ``HistoryBuffer``. A ``deque`` is read as a
    list; a ``defaultdict`` and a ``ConfigDict``, as a dict.

    Args:
        path: The file; safetensors if its name says so.
        map_location: As for ``torch.load``, except that None is the CPU; for .safetensors a device
            or None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or needs code to be executed.
        ImportError: If it is .safetensors and safetensors is not installed.
        ValueError: If it is .safetensors and ``map_location`` is not a device or None.
    """
    require_file(path)
    _verify_checksum(path)
    map_location = 'cpu' if map_location is None else map_location
    if path.suffix != '.safetensors':
        problem = damage(path) if restricted_unpickler.is_archive(path) else None
        if problem:
            raise CheckpointError(f'{path} is {problem}. Get it again, or use another checkpoint')
        return _explained(path, lambda: _read(path, map_location))
    if not isinstance(map_location, (str, torch.device)):
        raise ValueError(f'map_location must be a device or None for {path}, got {map_location!r}')
    load_file = _safetensors_reader()
    return _explained(path, lambda: load_file(path, device=str(map_location)))


def outline(path: Path) -> Any:
    """Return the content of a torch file, with the tensors of an archive mapped instead of read.

    Checksums are not verified; :func:`damage` does that.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read, or needs code to be executed.
    """
    require_file(path)
    return _explained(path, lambda: _read(path, 'cpu', mapped=True))


def damage(path: Path) -> str | None:
    """Return what is wrong with an archive by its own checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # noqa: BLE001 - damage shows in many ways
        return f'truncated or damaged: {shown(error, 200)}'
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


def _read(path: Path, map_location: MapLocation, mapped: bool = False) -> Any:
    content = restricted_unpickler.load(path, map_location, stand_ins.ALLOWED, mapped)
    return stand_ins.rebuilt(content)


def _explained(path: Path, read: Callable[[], Any]) -> Any:
    """Call ``read``, and explain its error if the file is refused or damaged."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - damage shows in many ways, all the same to a user
        refused = _refused(error)
        if refused:
            raise CheckpointError(
                f'{path} holds more than weights and was not read, since reading all of it could '
                f'execute code: {refused}\nIf you trust whoever made it, read it as torch does: '
                f'unsafe:{path}'
            ) from error
        reason = next(iter(str(error).strip().splitlines()), '')
        reason = f'{type(error).__name__}: {shown(reason, 200)}'
        whole = restricted_unpickler.is_archive(path) and damage(path) is None
        if whole or isinstance(error, _NOT_THERE):
            raise CheckpointError(
                f'{path} cannot be read with torch {torch.__version__} ({reason}). Give a file '
                'that torch.save wrote, or read it with the torch that wrote it'
            ) from error
        size = os.path.getsize(path)
        raise CheckpointError(
            f'{path} ({size} bytes) is damaged, truncated or not a checkpoint: {reason}. Get it '
            'again, or use another checkpoint'
        ) from error


def _refused(error: Exception) -> str | None:
    """Return the line of torch's long message that names what was refused, if any."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    marks = ('GLOBAL', 'getattr', 'unrecognized function', 'Can only', 'is blocked')
    lines = (line.strip() for line in str(error).splitlines())
    return next((shown(line, 200) for line in lines if any(mark in line for mark in marks)), None)


def _verify_checksum(path: Path) -> None:
    beside = checksum_path(path)
    if not beside.is_file():
        return
    with open(beside, 'rb') as file:
        expected = (file.read(4096).decode(errors='replace').split() or [''])[0].lower()
    if expected != sha256_of(path):
        raise CheckpointError(
            f'{path} does not match its checksum {beside.name}: get both again; if {path.name} was '
            f'changed on purpose, write its checksum anew: sha256sum {path.name} > {beside.name}'
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
