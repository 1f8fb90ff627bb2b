"""Compatibility with what may or may not be installed: mm packages, their operators, torch."""

from .coco_api import install_coco_reader
from .imports import when_imported
from .install import install_mmcv_ops
from .packages import check_stack, require_mmengine, stack_name

__all__ = [
    'check_stack',
    'install_coco_reader',
    'install_mmcv_ops',
    'require_mmengine',
    'stack_name',
    'when_imported',
]
