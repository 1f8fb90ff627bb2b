"""Write files atomically, and keep checksums beside them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Suffix that is added to a file name for its checksum.
CHECKSUM_SUFFIX = '.sha256'
_CHUNK = 1 << 22


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` once it is complete and on disk.

    If the block raises, ``path`` keeps its old content.
    """
    # hidden, and without the suffix of a checkpoint
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
    """Flush the entries of a folder to disk, if its file system supports that."""
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
    """Return the path of a file's checksum, which has the format of sha256sum."""
    return path.with_name(path.name + CHECKSUM_SUFFIX)
