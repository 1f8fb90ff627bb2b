"""The memory of a whole config's training step: heads count, and AdamW is told apart."""

import re

import pytest
from mmengine.config import Config

from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.programs import python


@pytest.mark.slow
@pytest.mark.parametrize('name', ['upernet_cpolynext_t_ade20k', 'retinanet_cpolynext_t_coco_1x'])
def test_weights_gradients_and_optimizer(name):
    config = ROOT / 'configs' / f'{name}.py'
    printed = python(
        ROOT / 'benchmarks' / 'config_memory.py', config, '--batch', 2, '--size', 128, 160
    )
    found = re.search(r'2 images of 128x160, bfloat16: (\d+) MiB, and (\d+) MiB of AdamW', printed)
    peak, optimizer = map(int, found.groups())
    cfg = Config.fromfile(config)
    cfg.model.backbone.init_cfg = None
    weights = sum(param.nbytes for param in build_model(cfg).parameters()) / 2**20
    assert optimizer == round(2 * weights)
    assert peak > 2 * weights  # and their gradients
