"""The examples of docs/segmentation.md, as configs."""

import shutil

import torch
from mmengine.config import Config

from tests.docs.pages import example
from tests.helpers.configs import build_model
from tests.helpers.files import CONFIG, mm_folder

PAGE = 'docs/segmentation.md'


def test_the_example_in_mmsegs_configs(tmp_path):
    configs = tmp_path / 'configs'
    for part in ('_base_', 'pspnet'):
        shutil.copytree(mm_folder('mmseg') / 'configs' / part, configs / part)
    path = configs / 'pspnet' / 'mine.py'
    path.write_text(example(PAGE, 'pspnet_r50'))
    cfg = Config.fromfile(path)
    assert cfg.default_hooks.checkpoint_guard.type == 'CheckpointGuardHook'
    assert cfg.default_hooks.training_check.type == 'TrainingCheckHook'
    assert 'logger' in cfg.default_hooks
    model = build_model(cfg).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape[1] == 19


def test_the_normalization_is_that_of_the_configs():
    shown = Config.fromstring(example(PAGE, 'bgr_to_rgb'), '.py').data_preprocessor
    used = Config.fromfile(CONFIG).model.data_preprocessor
    assert shown.items() <= used.items()
