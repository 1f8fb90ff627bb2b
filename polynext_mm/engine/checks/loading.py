"""Check samples as they are loaded, in training and validation, in the worker that loads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dataset import Compose

from .decoding import allow_large_images, count_ids, is_turned_by_exif, label_decoder
from .findings import (
    IGNORED,
    DataError,
    described,
    is_local,
    label_fault,
    listed,
    loading_error,
    size_fault,
    storage_fault,
)

# Raise after this many samples in a row with every pixel ignored: single ones are common.
PATIENCE = 50


class CheckedPipeline(Compose):
    """The pipeline of a data set, with checks on what its loading steps return.

    If a step whose name begins with ``Load`` fails, or returns what no model can learn from, a
    one-line error names the file. All other steps run unchanged. A check takes a hundredth of the
    time of decoding.

    Args:
        pipeline: The pipeline to replace; its steps are shared, not copied.
        num_classes: Number of classes of the data set; None if it does not say.
        is_segmentation: Whether label images hold classes of the data set.
        reduce_zero_label: Whether the data set lowers ids by one, for messages.
        patience: How many samples in a row without a pixel to learn from are an error.
        ignore_index: An id that is ignored besides 255.
        has_boxes: Whether ``height`` and ``width`` are the image size that boxes refer to.
    """

    def __init__(
        self,
        pipeline: Compose,
        num_classes: int | None,
        is_segmentation: bool,
        reduce_zero_label: bool = False,
        patience: int = PATIENCE,
        ignore_index: int = IGNORED,
        has_boxes: bool = False,
    ):
        self.transforms = pipeline.transforms
        self.num_classes = num_classes
        self.is_segmentation = is_segmentation
        self.reduce_zero_label = reduce_zero_label
        self.patience = patience
        self.ignore_index = ignore_index
        self.has_boxes = has_boxes
        self._ignored_in_a_row = 0

    def __call__(self, data: dict) -> dict | None:
        allow_large_images()
        for transform in self.transforms:
            name = type(transform).__name__
            if not name.startswith('Load'):
                data = transform(data)
                if data is None:
                    return None
                continue
            paths = [data.get('img_path'), data.get('seg_map_path')]
            if self.is_segmentation and name in ('LoadImageFromFile', 'LoadAnnotations'):
                paths = paths[:1] if name == 'LoadImageFromFile' else paths[1:]
            try:
                data = transform(data)
            except Exception as error:  # noqa: BLE001 - decoders can raise anything
                raise loading_error(list(filter(None, paths)), error) from error
            if data is None:
                return None
            # loaders of volumes and other formats follow their own rules
            if name == 'LoadAnnotations' and self.is_segmentation:
                self._check_label(data, transform)
            if name == 'LoadImageFromFile' and self.has_boxes:
                self._check_size(data)
            self._check_boxes(data)
        return data

    def _check_size(self, data: dict) -> None:
        """Compare an image with the size that its boxes refer to."""
        (height, width), path = data['ori_shape'][:2], data.get('img_path')
        listed_size = data.get('width'), data.get('height')
        if None not in listed_size and (width, height) != listed_size and is_local(path):
            raise DataError(str(size_fault(path, (width, height), listed_size)))

    def _check_label(self, data: dict, step: Any) -> None:
        label, path = np.asarray(data['gt_seg_map']), data.get('seg_map_path')
        size, label_map = data.get('ori_shape'), data.get('label_map')
        decoder = label_decoder([step])
        if is_local(path):
            fault = storage_fault(path, decoder)
            if fault:
                raise DataError(str(fault))
        fault = label_fault(
            label,
            size,
            self.num_classes,
            {IGNORED, self.ignore_index},
            reduce_zero_label=self.reduce_zero_label,
        )
        if fault:
            image = data.get('img_path')
            if size and label.shape == tuple(size[1::-1]) and is_turned_by_exif(image, size[1::-1]):
                raise DataError(
                    f'{described(path)} {fault.what}, which EXIF turns: draw the labels on the '
                    "turned picture, or set color_type='color_ignore_orientation' in every "
                    'LoadImageFromFile'
                )
            # OwnSegDataset maps ids missing in label_map to the first number beyond the classes
            if label_map and self.num_classes in label_map.values() and is_local(path):
                with open(path, 'rb') as file:
                    ids = count_ids(decoder.decode(file.read()))
                missing = [
                    i for i in ids if label_map.get(i, i) in range(self.num_classes, IGNORED)
                ]
                if missing:
                    raise DataError(
                        f'{described(path)} has the ids {listed(missing)}, which label_map does '
                        f'not name: add them to it, with {IGNORED} where they are no class'
                    )
            raise DataError(f'{described(path)} {fault}')
        self._count_ignored(label, path)

    def _count_ignored(self, label: np.ndarray, path: Any) -> None:
        if not self.patience or self.num_classes is None:
            return
        if (label < self.num_classes).any():
            self.patience = 0  # one label has classes, so later ones may be empty
            return
        self._ignored_in_a_row += 1
        if self._ignored_in_a_row >= self.patience:
            raise DataError(
                f'{described(path)}: every pixel is ignored, as in all {self._ignored_in_a_row} '
                'labels read so far: check reduce_zero_label, and that ids of classes are not all '
                '255' + (' or 0' if self.reduce_zero_label else '')
            )

    def _check_boxes(self, data: dict) -> None:
        labels, boxes = data.get('gt_bboxes_labels'), data.get('gt_bboxes')
        if labels is None or boxes is None or not len(labels):
            return
        where = described(data.get('img_path'))
        largest = int(np.asarray(labels).max())
        if self.num_classes is not None and largest >= self.num_classes:
            raise DataError(
                f'{where} has a box of class {largest}, and the {self.num_classes} classes have 0 '
                f'to {self.num_classes - 1}: check metainfo.classes against the annotations'
            )
        if not np.isfinite(np.asarray(getattr(boxes, 'tensor', boxes))).all():
            raise DataError(
                f'{where} has a box with a corner that is no finite number: correct it in the '
                'annotations'
            )


def leaves(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers (repeated, concatenated, mixed, cut)."""
    inner = getattr(dataset, 'dataset', None)
    if inner is not None:
        yield from leaves(inner)
    elif isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for part in dataset.datasets:
            yield from leaves(part)
    else:
        yield dataset


def is_segmentation(dataset: Any) -> bool:
    """Return whether a data set is mmseg's, with label images that hold its classes."""
    return hasattr(dataset, 'label_map') and hasattr(dataset, 'reduce_zero_label')


def check_loading(dataset: Any) -> list[Any]:
    """Make a data set check what it loads from now on; its class is unchanged.

    Args:
        dataset: Of a data loader whose workers have not started; it may be wrapped.

    Returns:
        list: The data sets inside that were not checked before.
    """
    new = []
    for leaf in leaves(dataset):
        pipeline = getattr(leaf, 'pipeline', None)
        # a custom Compose may do more than run its steps
        if type(pipeline) is not Compose:
            continue
        classes = leaf.metainfo.get('classes')
        leaf.pipeline = CheckedPipeline(
            pipeline,
            None if classes is None else len(classes),
            is_segmentation(leaf),
            bool(getattr(leaf, 'reduce_zero_label', False)),
            min(PATIENCE, len(leaf)),
            getattr(leaf, 'ignore_index', IGNORED),
            hasattr(leaf, 'COCOAPI'),
        )
        new.append(leaf)
    return new
