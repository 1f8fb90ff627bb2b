"""Paths, and copies of files."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CONFIG = ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py'


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the bytes of every file below a folder, by relative path."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }


def mm_folder(package: str) -> Path:
    """Return the folder of mmseg or mmdet that has their configs and tools."""
    return Path(importlib.import_module(package).__file__).parent / '.mim'
