"""Find configs, tools and benchmarks in a wheel or a clone, and demo in a clone."""

from __future__ import annotations

import difflib
from pathlib import Path

from . import runs

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = ('configs', 'tools', 'benchmarks', 'demo')


class ConfigNotFoundError(FileNotFoundError):
    """There is no config of that name."""


def folder(name: str) -> Path:
    """Return the folder ``configs``, ``tools``, ``benchmarks`` or ``demo``.

    Raises:
        ValueError: If it is none of these.
        FileNotFoundError: If this installation does not have it.
    """
    if name not in _FOLDERS:
        raise ValueError(f'{name!r} is not one of {", ".join(_FOLDERS)}')
    places = [_PACKAGE / name]
    if (_PACKAGE.parent / 'pyproject.toml').is_file():
        places.append(_PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f'{name}/ is part of a clone of the repository, and not of this installation'
    )


def config_names() -> list[str]:
    """Return the names of the configs that come with the package, sorted."""
    return sorted(path.stem for path in folder('configs').glob('*.py'))


def config_file(name: str) -> str:
    """Return the path of a config that comes with the package.

    Configs of other projects inherit from it wherever it is installed::

        _base_ = __import__('polynext_mm').config_file('upernet_cpolynext_s_ade20k')

    Args:
        name: Its name, with or without ``.py`` and ``configs/``; ``_base_/...`` names a part.

    Raises:
        ConfigNotFoundError: If there is no such config; the message has the most similar names.
    """
    relative = str(name).removeprefix('configs/').removesuffix('.py') + '.py'
    path = folder('configs') / relative
    if not path.is_file():
        similar = difflib.get_close_matches(Path(relative).stem, config_names(), n=2)
        hint = f'did you mean {" or ".join(similar)}?' if similar else '`polynext-mm list` has all'
        raise ConfigNotFoundError(f'there is no config {name}; {hint}')
    return str(path)


def find_config(argument: str | Path) -> str:
    """Return the path of the config that a command line names.

    Args:
        argument: A path, with or without ``.py``; a work dir, which has the config of its
            training; or the name of one of ours.

    Raises:
        ConfigNotFoundError: If there is none of these.
    """
    for path in (str(argument), f'{argument}.py'):
        if Path(path).is_file():
            return path
    if Path(argument).is_dir():
        found = runs.config_of(argument)
        if found is not None:
            return found
        if Path(argument).name not in config_names():
            raise ConfigNotFoundError(
                f'{argument} has no config (*.py): a work dir has that of its training'
            )
    return config_file(str(argument))
