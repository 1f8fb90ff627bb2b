"""Deployment: graphs of segmentors, detectors and backbones for other programs to run."""

from .networks import OUTPUTS, Network, UnsupportedModelError, make_network
from .programs import FORMATS, TOLERANCE, ExportError, capture, check, fused, open_file, write_file

__all__ = [
    'FORMATS',
    'OUTPUTS',
    'TOLERANCE',
    'ExportError',
    'Network',
    'UnsupportedModelError',
    'capture',
    'check',
    'fused',
    'make_network',
    'open_file',
    'write_file',
]
