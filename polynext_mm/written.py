"""The rule for files that commands write: never overwrite an input or another result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

#: Errors of full disks, of folders that cannot be written, and of impossible file names.
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


class OverwriteError(ValueError):
    """A result would overwrite an input, or another result."""


def require_apart(targets: Iterable[tuple[str, Path]], inputs: Iterable[str | os.PathLike]) -> None:
    """Check that every result has its own file, and none replaces an input.

    Symbolic and hard links count as the files that they point to.

    Args:
        targets: For each file to write, the option of the command, such as '--out', and the path.
        inputs: All files that are read: images, labels, annotations, config, checkpoint.

    Raises:
        OverwriteError: Otherwise, naming the file and the option.
    """
    read = {identity for path in inputs for identity in _identities(Path(path))}
    taken: dict[object, str] = {}
    for option, path in targets:
        identities = _identities(path)
        if not read.isdisjoint(identities):
            raise OverwriteError(
                f'{path} is an input and would be overwritten: take another {option}'
            )
        earlier = next((taken[key] for key in identities if key in taken), None)
        if earlier is not None:
            what = 'two inputs' if earlier == option else f'{earlier} and {option}'
            remedy = 'rename one' if earlier == option else f'take another {option}'
            raise OverwriteError(f'{what} would be written to {path}: {remedy}')
        taken.update(dict.fromkeys(identities, option))


def _identities(path: Path) -> list[object]:
    """Return what identifies a file: its path without links, and its inode if it exists."""
    found: list[object] = [os.path.realpath(path)]
    try:
        status = path.stat()
    except OSError:  # does not exist yet, or is a url
        return found
    return [*found, (status.st_dev, status.st_ino)]
