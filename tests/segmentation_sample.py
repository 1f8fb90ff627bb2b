"""A small generated segmentation data set, its mistakes, and the config that reads it."""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from tests.helpers.files import CONFIG

CLASSES = ('ground', 'road', 'roof', 'tree')
SIZE = (48, 40)


def make_segmentation(root: Path, train: int = 4, val: int = 3) -> Path:
    """Write ``images`` and ``labels``, each with ``train`` and ``val``, to ``root``; return it."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / 'images' / split / f'{index:02d}.jpg')
            write_label(root, split, index, rng.integers(0, len(CLASSES), SIZE[::-1]))
    return root


def label_path(root: Path, split: str, index: int) -> Path:
    return root / 'labels' / split / f'{index:02d}.png'


def image_path(root: Path, split: str, index: int) -> Path:
    return root / 'images' / split / f'{index:02d}.jpg'


def write_label(root: Path, split: str, index: int, ids: np.ndarray) -> Path:
    path = label_path(root, split, index)
    Image.fromarray(ids.astype(np.uint8 if ids.max() < 256 else np.uint16)).save(path)
    return path


def constant(value: int) -> np.ndarray:
    """A label of one id."""
    return np.full(SIZE[::-1], value)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def end_missing(path: Path, count: int) -> None:
    """Make a PNG of an image, under its old name, and leave out its last bytes.

    Pillow reads that, and OpenCV does not.
    """
    with Image.open(path) as image:
        image.save(path, 'PNG')
    path.write_bytes(path.read_bytes()[:-count])


def segmentation_config(root: Path, **options) -> Config:
    """The smallest published network on the generated set.

    Args:
        root: Of the data set.
        options: Settings to merge, keys with dots.
    """
    cfg = Config.fromfile(CONFIG)
    load = dict(type='LoadAnnotations', reduce_zero_label=False)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(
            type='BaseSegDataset',
            metainfo=dict(classes=CLASSES),
            data_root=str(root),
            reduce_zero_label=False,
            data_prefix=dict(
                img_path=f'images/{"train" if split == "train" else "val"}',
                seg_map_path=f'labels/{"train" if split == "train" else "val"}',
            ),
        )
        steps = loader.dataset.pipeline
        steps[1 if split == 'train' else 2] = load
    for head in ('decode_head', 'auxiliary_head'):
        cfg.model[head].update(num_classes=len(CLASSES), channels=16)
    cfg.model.backbone.init_cfg = None
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    cfg.merge_from_dict(options)
    return cfg
