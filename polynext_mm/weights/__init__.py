"""Weights: the published files, their names and containers, safe reading and strict loading."""

from .convert import convert
from .files import CheckpointError, install_loader, read, safe_reading
from .loading import load
from .published import PUBLISHED, Published

__all__ = [
    'PUBLISHED',
    'CheckpointError',
    'Published',
    'convert',
    'install_loader',
    'load',
    'read',
    'safe_reading',
]
