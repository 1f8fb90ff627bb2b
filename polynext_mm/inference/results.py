"""A model's results for an image: plain arrays, and pictures and files made from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import drawing


@dataclass(frozen=True)
class _Result:
    """The base of all results.

    Attributes:
        image: The input image, (H, W, 3) uint8 in RGB.
        classes: Names of the classes of the model.
        palette: A colour, (R, G, B), for each.
        path: Path of the image; None if it was not read from a file.
    """

    image: np.ndarray
    classes: tuple[str, ...]
    palette: tuple[drawing.Colour, ...]
    path: str | None

    def draw(self, opacity: float = 0.5, legend: bool = True) -> Image.Image:
        """Return the image with what was found drawn on it.

        Args:
            opacity: Opacity of colours over the image, from 0 to 1.
            legend: Whether to name the classes.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike, opacity: float = 0.5, legend: bool = True) -> None:
        """Write what :meth:`draw` returns, in the suffix's format; folders are created."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.draw(opacity, legend).save(path)

    def annotations(self, image_id: int = 0, first_id: int = 1) -> list[dict]:
        """Return the results as annotations in COCO's format, with ids from ``first_id``."""
        raise NotImplementedError

    def to_coco(self) -> dict:
        """Return a dict in COCO's format for this image alone: images, annotations, categories.

        Categories count from 1, in the order of ``classes``. Boxes are (x, y, width, height) in
        pixels, masks are run-length encoded.
        """
        height, width = self.image.shape[:2]
        name = '' if self.path is None else str(self.path)
        return dict(
            images=[dict(id=0, file_name=name, width=width, height=height)],
            annotations=self.annotations(),
            categories=categories(self.classes),
        )


@dataclass(frozen=True)
class Segmentation(_Result):
    """The class of every pixel.

    Attributes:
        labels: Index into ``classes`` for every pixel, (H, W), uint8 (uint16 beyond 256 classes).
        logits: (classes, H, W) float32 if requested, else None. A model with one logit returns the
            probability of class 1, (1, H, W).
    """

    labels: np.ndarray
    logits: np.ndarray | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of pixels of each class that occurs, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts[: len(self.classes)], kind='stable')
        return {self.classes[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}

    def draw(self, opacity: float = 0.5, legend: bool = True) -> Image.Image:
        picture = drawing.coloured(self.image, self.labels, self.palette, opacity)
        if legend:
            colours = dict(zip(self.classes, self.palette))
            picture = drawing.with_legend(picture, [(name, colours[name]) for name in self.shares])
        return Image.fromarray(picture)

    def save_labels(self, path: str | os.PathLike) -> None:
        """Write ``labels`` as a PNG of one channel; folders are created."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.labels).save(path)

    def annotations(self, image_id: int = 0, first_id: int = 1) -> list[dict]:
        """Return one annotation, with a mask, for each class that occurs."""
        present = np.unique(self.labels[self.labels < len(self.classes)])
        masks = self.labels[None] == present[:, None, None]
        return [
            dict(id=first_id + i, image_id=image_id, category_id=int(label) + 1, **_encoded(mask))
            for i, (label, mask) in enumerate(zip(present, masks))
        ]


@dataclass(frozen=True)
class Detections(_Result):
    """The objects in an image whose scores are above the threshold, best first.

    Attributes:
        boxes: (N, 4) float32, the corners (x1, y1, x2, y2) in pixels of the image.
        scores: (N,) float32 from 0 to 1.
        labels: (N,) int64, indices into ``classes``.
        masks: (N, H, W) bool if the model predicts masks, else None.
        best_left_out: The highest score that is not above the threshold; None if there is none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    best_left_out: float | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def draw(self, opacity: float = 0.5, legend: bool = True) -> Image.Image:
        colours = [self.palette[label] for label in self.labels]
        picture = self.image
        for mask, colour in zip(self.masks if self.masks is not None else (), colours):
            picture = drawing.coloured(picture, np.where(mask, 0, 1), (colour,), opacity)
        texts = [f'{self.classes[i]} {s:.2f}' for i, s in zip(self.labels, self.scores)]
        return drawing.boxed(picture, self.boxes, colours, texts if legend else None)

    def annotations(self, image_id: int = 0, first_id: int = 1) -> list[dict]:
        """Return one annotation for each object, with its score, and its mask if it has one."""
        found = []
        for index, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            annotation: dict[str, Any] = dict(area=(x2 - x1) * (y2 - y1), iscrowd=0)
            if self.masks is not None:
                annotation = _encoded(self.masks[index])
            annotation |= dict(
                id=first_id + index,
                image_id=image_id,
                category_id=int(self.labels[index]) + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                score=float(self.scores[index]),
            )
            found.append(annotation)
        return found


def categories(classes: Sequence[str], first: int = 1) -> list[dict]:
    """Return classes as categories in COCO's format, which counts from 1."""
    return [dict(id=index, name=str(name)) for index, name in enumerate(classes, first)]


def _encoded(mask: np.ndarray) -> dict:
    """Return a mask (H, W) in COCO's format: run lengths, area, box."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(
        segmentation=dict(size=code['size'], counts=code['counts'].decode()),
        area=int(coco.area(code)),
        bbox=coco.toBbox(code).tolist(),
        iscrowd=0,
    )
