"""A segmentation data set of one's own, whose label files may hold ids that are no class.

This module needs mmseg, and so is not imported with the package: configs that use the data set name
it in ``custom_imports``, as ``configs/_base_/own_segmentation.py`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset

from ..engine.checks.findings import IGNORED, DataError


@DATASETS.register_module()
class OwnSegDataset(BaseSegDataset):
    """mmseg's ``BaseSegDataset`` with ids that are ignored, wherever labels are loaded.

    Training, evaluation, test-time augmentation and the checks of data all follow, since the data
    set maps the ids, not a step of a pipeline.

    Args:
        ignored_ids: Ids in the label files that are no class and are read as 255, besides 255
            itself.
        options: As of ``BaseSegDataset``.

    Raises:
        DataError: If an ignored id is the id of a class, or not within 0 to 255.
    """

    def __init__(self, ignored_ids: Sequence[int] = (), **options: Any):
        self.ignored_ids = tuple(ignored_ids)
        self._first_id = int(options.get('reduce_zero_label', False))
        super().__init__(**options)

    def get_label_map(self, new_classes: Sequence[str] | None = None) -> dict[int, int] | None:
        """Return what the ids of label files become, counted as mmseg counts them when it maps.

        Args:
            new_classes: Names of the classes.
        """
        if not self.ignored_ids:
            return None
        classes = range(self._first_id, self._first_id + len(new_classes or ()))
        for value in self.ignored_ids:
            if type(value) is not int or not 0 <= value <= IGNORED or value in classes:
                raise DataError(
                    f'ignored_ids={list(self.ignored_ids)}: {value!r} must be within 0 to '
                    f'{IGNORED} and no class; the ids of the {len(classes)} classes are '
                    f'{classes.start} to {classes.stop - 1}'
                )
        # mmseg maps after it has taken 1 from ids (reduce_zero_label), 0 and 255 excepted
        ignored = {
            value - self._first_id: IGNORED
            for value in self.ignored_ids
            if value != IGNORED and value >= self._first_id
        }
        return {value: value for value in range(len(classes))} | ignored
