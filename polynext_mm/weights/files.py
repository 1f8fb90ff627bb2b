"""Files written whole or not at all, and the checksums beside them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

#: What is added to the name of a file for that of its checksum.
CHECKSUM_SUFFIX = '.sha256'
_CHUNK = 1 << 22


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that replaces ``path`` once it is whole and on the disk.

    If the block raises, ``path`` keeps its old content.
    """
    # hidden, and without a suffix that a checkpoint has
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield partial
        with open(partial, 'r+b') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, where its file system does that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


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
