"""Predictions kept by an evaluation, each in its own file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from PIL import Image

from .checks.coco import read_coco
from .checks.data import lazily_built, list_pairs
from .checks.decoding import Decoder
from .checks.findings import is_local
from .checks.walk import TASKS, datasets_of


def label_file(out: str | Path, root: str | None, image: str) -> Path:
    """Return the path of the label image for an image.

    Args:
        out: Folder of all label images.
        root: Folder of the images; its subfolders are kept below ``out``. None keeps none.
        image: Path of the image.
    """
    name = Path(image).name if root is None else os.path.relpath(image, root)
    return Path(out) / Path(name).with_suffix('.png')


@METRICS.register_module()
class LabelImages(BaseMetric):
    """Keep predictions of a segmentor as label images, in the folder structure of the images.

    Ids are those of the data set's label files: they count from 1 with ``reduce_zero_label``.

    Args:
        out: Folder to write to.
        root: Folder of the images; None keeps only their names.
    """

    def __init__(self, out: str, root: str | None = None):
        super().__init__()
        self.out, self.root = out, root

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            ids = sample['pred_sem_seg']['data'].squeeze().cpu().numpy().astype(np.int64)
            ids += bool(sample.get('reduce_zero_label'))
            path = label_file(self.out, self.root, sample['img_path'])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16)).save(path)
            self.results.append(None)

    def compute_metrics(self, results: list) -> dict:
        return {}


@HOOKS.register_module()
class DecodedVisualizationHook(Hook):
    """Draw predictions of a segmentor on images as its pipeline decodes them.

    mmseg's hook reads every image as 8 bits in three upright channels, whatever the pipeline does.

    Args:
        color_type: As for mm's LoadImageFromFile.
        imdecode_backend: Likewise.
        show: Whether to show each picture in a window.
        wait_time: For how many seconds.
    """

    def __init__(
        self, color_type: str, imdecode_backend: str, show: bool = False, wait_time: float = 0.0
    ):
        self.decoder = Decoder(color_type, imdecode_backend)
        self.show, self.wait_time = show, wait_time
        self.count = 0

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        for sample in outputs or ():
            self.count += 1
            Visualizer.get_current_instance().add_datasample(
                f'test_{os.path.basename(sample.img_path)}',
                np.asarray(self.decoder.picture(Path(sample.img_path).read_bytes())),
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                step=self.count,
            )


def files_of(cfg: Config, task: str, with_images: bool = True) -> tuple[list[str], list[str]]:
    """Return the images of the data sets of a loader, and their label and annotation files.

    Args:
        task: 'train', 'val' or 'test'.
        with_images: Whether annotation files in COCO's format are read for their images.
    """
    images: list[str] = []
    others: list[str] = []
    dataset = (cfg.get(f'{task}_dataloader') or {}).get('dataset')
    for place, settings in datasets_of(dataset, f'{task}_dataloader.dataset'):
        source = lazily_built(cfg, settings, place)
        if source is None or (source.ann_file and not os.path.exists(source.ann_file)):
            continue
        if hasattr(source, 'label_map'):
            if not os.path.isdir(source.data_prefix.get('img_path') or ''):
                continue
            pairs, _ = list_pairs(source, place)
            images += [image for image, _ in pairs]
            others += [label for _, label in pairs if label]
        elif is_local(source.ann_file):
            others.append(source.ann_file)
            if with_images:
                folder = source.data_prefix.get('img') or ''
                names = (entry['file_name'] for entry in read_coco(source.ann_file)['images'])
                images += [os.path.join(folder, name) for name in names]
    return images, others


def all_files_of(cfg: Config, with_images: bool) -> list[str]:
    """Return every known file that the data sets of a config read."""
    return [path for task in TASKS for part in files_of(cfg, task, with_images) for path in part]


def root_of(images: Sequence[str]) -> str | None:
    """Return the folder that holds all images, at any depth; None without images."""
    return os.path.commonpath([os.path.dirname(path) for path in images]) if images else None
