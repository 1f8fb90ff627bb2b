"""A custom segmentation data set, whose label files may hold other ids than 0, 1, 2, ...

This module needs mmseg, so it is not imported with the package: configs that use the data set list
it in ``custom_imports``, as ``configs/_base_/own_segmentation.py`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset

from ..engine.checks.findings import IGNORED, DataError


@DATASETS.register_module()
class OwnSegDataset(BaseSegDataset):
    """mmseg's ``BaseSegDataset`` with ids that are mapped or ignored, wherever labels are loaded.

    Since the data set maps the ids, not a step of a pipeline, this also applies to evaluation,
    test-time augmentation and the data checks.

    Args:
        ignored_ids: Ids in the label files that are no class and are read as 255, besides 255
            itself.
        label_map: The class of each id in the label files, such as ``{0: 0, 255: 1}`` for binary
            masks; 255 for ignored ids. Ids not listed are errors, except 255. By default an id is
            the index of its class.
        options: As for ``BaseSegDataset``.

    Raises:
        DataError: If an ignored id is that of a class, an id is not within 0 to 255, or a class is
            not one of the data set's.
    """

    def __init__(
        self,
        ignored_ids: Sequence[int] = (),
        label_map: Mapping[int, int] | None = None,
        **options: Any,
    ):
        self.ignored_ids = tuple(ignored_ids)
        self._own_map = dict(label_map or {})
        self._first_id = int(options.get('reduce_zero_label', False))
        super().__init__(**options)

    def get_label_map(self, new_classes: Sequence[str] | None = None) -> dict[int, int] | None:
        """Return the mapping of ids, numbered as mmseg numbers them when it applies it.

        Args:
            new_classes: Names of the classes.
        """
        number = len(new_classes or ())
        if self._own_map:
            self._check_own_map(number)
        elif not self.ignored_ids:
            return None
        first = self._first_id
        classes = self._own_map or {value: value - first for value in range(first, first + number)}
        for value in self.ignored_ids:
            if type(value) is not int or not 0 <= value <= IGNORED or value in classes:
                raise DataError(
                    f'ignored_ids={list(self.ignored_ids)}: {value!r} must be within 0 to '
                    f'{IGNORED} and no class; the ids of the {number} classes are '
                    f'{min(classes, default=0)} to {max(classes, default=0)}'
                )
        # mmseg maps after it has subtracted 1 from ids other than 0 and 255 (reduce_zero_label)
        ignored = {
            value - first: IGNORED
            for value in self.ignored_ids
            if value != IGNORED and value >= first
        }
        if not self._own_map:
            return {value: value for value in range(number)} | ignored
        # ids not listed must not remain a class: map them to the first number beyond, an error
        return {value: number for value in range(number)} | self._own_map | ignored

    def _check_own_map(self, number: int) -> None:
        if self._first_id:
            raise DataError(
                f'label_map={self._own_map} names ids as the files have them: set '
                'reduce_zero_label=False, and 0: 255 in label_map if 0 is ignored'
            )
        for value, index in self._own_map.items():
            if type(value) is not int or not 0 <= value <= IGNORED:
                raise DataError(
                    f'label_map={self._own_map}: {value!r} is no id, a number from 0 to {IGNORED}'
                )
            if type(index) is not int or not (0 <= index < number or index == IGNORED):
                raise DataError(
                    f'label_map={self._own_map}: {index!r} is no class, 0 to {number - 1}, nor '
                    f'{IGNORED} for ignored'
                )
