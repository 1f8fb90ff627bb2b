"""Checks of data sets, before and during training: broken files, wrong labels, useless boxes."""

from ..compat import require_mmengine

require_mmengine()

# ruff: noqa: E402 - the error above says more than theirs
from ..engine.checks.coco import audit_coco
from ..engine.checks.findings import DataError, Finding
from ..engine.checks.loading import CheckedPipeline, check_loading, leaves
from ..engine.checks.survey import survey

__all__ = [
    'CheckedPipeline',
    'DataError',
    'Finding',
    'audit_coco',
    'check_loading',
    'leaves',
    'survey',
]
