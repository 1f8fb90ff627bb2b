"""Run the tools of this repository as a user does, and find what they wrote."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_tool(name: str, *args: object) -> None:
    """Run a script of tools/ to its end.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, str(ROOT / 'tools' / name), *map(str, args)], check=True)


def announce(step: str) -> None:
    """Say what comes next and how long it takes, before its own output."""
    print(f'\n==> {step}', flush=True)


def newest(folder: Path, pattern: str) -> Path:
    """Return the file that was written last; a work dir has one for each run."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
