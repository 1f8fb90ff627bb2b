"""Find the config and the checkpoints in a work dir.

Wherever a command or the Predictor takes a config and a checkpoint, a work dir stands for both.
This module imports only the standard library.
"""

from __future__ import annotations

import os
from pathlib import Path

BEST, LAST = 'best', 'last'
_WEIGHTS = ('.pth', '.pt', '.safetensors')
# saved for inspection only
_NOT_FINITE = 'nonfinite'
_SHOWN = 8


class RunNotFoundError(FileNotFoundError):
    """There is no such work dir, or no such checkpoint in it."""


def config_of(folder: str | Path) -> str | None:
    """Return the config that the last training in a work dir was run with; None if there is none.

    mmengine writes it there under the name of the config file.
    """
    configs = [path for path in Path(folder).glob('*.py') if path.is_file()]
    return str(max(configs, key=_time)) if configs else None


def is_work_dir(path: str | Path) -> bool:
    """Return whether a path is a folder with a config in it."""
    return Path(path).is_dir() and config_of(path) is not None


def find_checkpoint(config: str | os.PathLike, checkpoint: str | os.PathLike | None) -> str:
    """Return the checkpoint that a config or work dir and a name refer to.

    Args:
        config: As given by the user: a work dir, or a config, whose work dir is
            ``work_dirs/CONFIG`` or the folder that it is in.
        checkpoint: A path, url or published name; the name of a file in the work dir; 'best' or
            'last'; None for the best, or else the newest, in the work dir.

    Raises:
        RunNotFoundError: If it is not there; the message lists those that are.
    """
    folder = _folder_of(config)
    name = None if checkpoint is None else os.fspath(checkpoint)
    if name is not None and name not in (BEST, LAST):
        if '://' in name or name.startswith('unsafe:') or Path(name).expanduser().is_file():
            return name
        if (folder / name).is_file():
            return str(folder / name)
        parent = Path(name).parent
        listed = folder if parent == Path() or not parent.is_dir() else parent
        raise RunNotFoundError(
            f'there is no checkpoint {name} (relative paths start at {Path.cwd()}); '
            f'{_there(listed)}'
        )
    if name is None and not Path(config).is_dir():
        raise RunNotFoundError(
            f'{config} is a config: name a checkpoint with it, or give its work dir alone'
        )
    checkpoints = _checkpoints(folder)
    best = [path for path in checkpoints if path.name.startswith(BEST)]
    others = [path for path in checkpoints if path not in best]
    wanted = {BEST: best, LAST: others}.get(name or '', best or others)
    if not wanted:
        which = f'{name} checkpoint' if name else 'checkpoint'
        raise RunNotFoundError(f'there is no {which} in {folder}; {_there(folder)}')
    return str(wanted[-1])


def _folder_of(config: str | os.PathLike) -> Path:
    path = Path(config)
    if path.is_dir():
        return path
    usual = Path('work_dirs') / path.stem
    return usual if usual.is_dir() else path.parent


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    files = folder.iterdir() if folder.is_dir() else ()
    found = [
        path
        for path in files
        if path.suffix in _WEIGHTS and not path.name.startswith(_NOT_FINITE) and path.is_file()
    ]
    return sorted(found, key=_time)


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _there(folder: Path) -> str:
    names = [path.name for path in reversed(_checkpoints(folder))]
    if not names:
        return f'{folder} has none' if folder.is_dir() else f'there is no folder {folder} either'
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return f'{folder} has {", ".join(names[:_SHOWN])}{more}'
