"""Packages that only some features need."""

import importlib
from types import ModuleType


def require_timm() -> ModuleType:
    """Import timm.

    Raises:
        ImportError: If it is missing; the message says what to install.
    """
    try:
        return importlib.import_module('timm')
    except ModuleNotFoundError as error:
        if error.name != 'timm':
            raise
        raise ImportError(
            'this needs timm, which is not installed: run `pip install timm`', name='timm'
        ) from error
