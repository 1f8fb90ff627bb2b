"""Checks of data sets, before and during training: broken files, wrong labels, useless boxes."""

from ..compat import require_mmengine

require_mmengine()

# ruff: noqa: E402 - the error above says more than theirs
from .coco import audit_coco
from .findings import DataError, Finding
from .loading import CheckedPipeline, check_loading, leaves
from .survey import survey

__all__ = [
    'CheckedPipeline',
    'DataError',
    'Finding',
    'audit_coco',
    'check_loading',
    'leaves',
    'survey',
]
