"""Weights: the published files, their names and containers, safe reading and strict loading.

Reading, converting and loading need torch alone; ``install_loader`` is for mmengine.
"""

from .convert import convert
from .errors import CheckpointError
from .loading import load
from .mm_loader import install_loader, safe_reading
from .published import PUBLISHED, Published
from .reading import read

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
