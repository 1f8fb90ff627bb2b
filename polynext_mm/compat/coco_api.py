"""COCO's annotations as mmdet reads them for data sets and for metrics, with three things mended.

- A box without ``iscrowd`` is no crowd. mmdet's data set thinks so too, and pycocotools raises
  KeyError in the first evaluation.
- Ids of annotations are whatever the file says. pycocotools takes a match with the id 0 for none,
  so that a perfect detection counts as wrong, and cannot compare texts.
- Classes are matched by name, wherever the file lists them: label ``i`` is the ``i``-th of the
  names asked for. mmdet numbers them in the order of the file, so that two files with other orders
  gave the same class two labels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .imports import when_imported

_MODULE = 'mmdet.datasets.api_wrappers.coco_api'


def install_coco_reader() -> None:
    """Mend mmdet's reader as soon as it is imported; pycocotools itself stays as it is."""
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
