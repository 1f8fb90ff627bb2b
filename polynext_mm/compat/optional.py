"""Packages that only some features need."""

import importlib
from types import ModuleType

from .packages import MissingPackageError


def require(name: str) -> ModuleType:
    """Import a module of an optional package of the same name.

    Raises:
        ImportError: If it is missing; the message says what to install.
    """
    package = name.partition('.')[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackageError(
            f'this needs {package}, which is not installed: run `pip install {package}`',
            name=package,
        ) from error


def require_timm() -> ModuleType:
    """Import timm.

    Raises:
        ImportError: If it is missing; the message says what to install.
    """
    return require('timm')
