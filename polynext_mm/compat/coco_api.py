"""mmdet's reader of COCO annotations, for data sets and metrics, with three fixes.

- A box without ``iscrowd`` is not a crowd, as in mmdet's data set; pycocotools would raise KeyError
  in the first evaluation.
- Annotations may have any ids. pycocotools takes a match with id 0 for no match, so that a perfect
  detection counts as wrong, and it cannot compare strings.
- Classes are matched by name in any order: label ``i`` is the ``i``-th of the requested names.
  mmdet numbers them in the order of the file, so that two files with different orders would give
  the same class two labels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .imports import when_imported

_MODULE = 'mmdet.datasets.api_wrappers.coco_api'


def install_coco_reader() -> None:
    """Patch mmdet's reader as soon as it is imported; pycocotools itself is unchanged."""
    when_imported(
        _MODULE,
        _mend,
        failure="mmdet's reader of COCO could not be mended, so that classes are numbered in the "
        'order of each file: list them there as in metainfo.classes',
    )


def _mend() -> None:
    reader = sys.modules[_MODULE].COCO
    create_index = reader.createIndex

    def createIndex(self: Any) -> None:  # noqa: N802 - pycocotools' name
        annotations = self.dataset.get('annotations', ())
        for annotation in annotations:
            annotation['iscrowd'] = int(annotation.get('iscrowd') or 0)
        if any(not isinstance(entry.get('id'), int) or entry['id'] < 1 for entry in annotations):
            for number, annotation in enumerate(annotations, start=1):
                annotation['id'] = number
        create_index(self)

    def get_cat_ids(
        self: Any,
        cat_names: Sequence[str] = (),
        sup_names: Sequence[str] = (),
        cat_ids: Sequence[int] = (),
    ) -> list[int]:
        found = self.getCatIds(cat_names, sup_names, cat_ids)
        if isinstance(cat_names, str) or not cat_names:
            return found
        places = {name: place for place, name in enumerate(cat_names)}
        return sorted(found, key=lambda identity: places[self.cats[identity]['name']])

    reader.createIndex = createIndex
    reader.get_cat_ids = get_cat_ids
