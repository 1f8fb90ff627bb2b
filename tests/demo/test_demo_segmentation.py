"""demo/segmentation.py goes from training to the table and the pictures."""

import re

import numpy as np
import pytest
from mmengine.config import Config

from tests.helpers.files import ROOT
from tests.helpers.programs import python, script

segmentation = script('demo/segmentation')


def test_the_colour_classifier_sees_colours_and_nothing_else():
    """Colours that tell the class are learned; stripes of two classes in one colour are not."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (4, 16, 16), dtype=np.uint8)
    told = np.where(labels[..., None] == 1, [200, 40, 40], [40, 40, 200]).astype(np.uint8)
    predictions = segmentation.predict_by_colour(told, labels, told, 2, steps=150)
    assert segmentation.class_ious(predictions, labels, 2).tolist() == [100, 100]
    predictions = segmentation.predict_by_colour(told * 0, labels, told * 0, 2, steps=150)
    assert len(np.unique(predictions)) == 1


def test_nothing_is_chosen_on_the_scenes_that_give_the_figure():
    cfg = Config.fromfile(segmentation.CONFIG)
    used = {
        name: cfg[f'{name}_dataloader'].dataset.data_prefix.img_path
        for name in ('train', 'val', 'test')
    }
    assert used == {'train': 'images/training', 'val': 'images/tuning', 'test': 'images/test'}


@pytest.mark.slow
def test_a_quick_look(tmp_path):
    demo = ROOT / 'demo' / 'segmentation.py'
    printed = python(demo, '--max-iters', 2, '--seed', 3, '--work-dir', tmp_path)
    rows = re.findall(r'^(\w+) +([\d.]+) +([\d.]+)$', printed, flags=re.MULTILINE)
    cfg = Config.fromfile(segmentation.CONFIG)
    assert [row[0] for row in rows] == [*cfg.metainfo.classes, 'mIoU']
    assert all(
        (tmp_path / name).stat().st_size > 10_000 for name in ('sheet.png', 'report/curves.png')
    )
    assert 'with seed 3 on' in printed
    saved = min(tmp_path.glob('*/vis_data/config.py'))  # of the training, not the evaluation
    assert Config.fromfile(saved).randomness.seed == 3
