"""Weights: the published files, their names and containers, safe reading and strict loading.

All of it needs only torch.
"""

from .convert import convert
from .errors import CheckpointError
from .loading import load
from .published import PUBLISHED, Published
from .reading import read, safe_reading

__all__ = [
    'PUBLISHED',
    'CheckpointError',
    'Published',
    'convert',
    'load',
    'read',
    'safe_reading',
]
