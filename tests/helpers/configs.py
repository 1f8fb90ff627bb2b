"""Real configs, made to run in seconds."""

from __future__ import annotations

import importlib
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import polynext_mm  # noqa: F401 - registers
from tests.helpers.files import CONFIG
from tests.helpers.tiny import TINY_ARCH

# Options with which the network of CONFIG is the tiny one. Without: where released weights matter.
TINY_NETWORK = {
    'model.backbone.arch': dict(TINY_ARCH, _delete_=True),
    'model.decode_head.in_channels': list(TINY_ARCH['widths']),
    'model.decode_head.channels': 8,
    'model.auxiliary_head.in_channels': TINY_ARCH['widths'][2],
    'model.auxiliary_head.channels': 8,
}


def tiny_options(data_root: str | Path, iters: int = 1) -> dict:
    """Return the --cfg-options that make an ADE20K config run in seconds."""
    options = {
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.pipeline.2.scale': (128, 128),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'model.data_preprocessor.size': (64, 64),
        'model.backbone.init_cfg': None,
        'model.decode_head.channels': 16,
        'model.auxiliary_head.channels': 16,
        'model.test_cfg.mode': 'whole',
        'train_cfg.max_iters': iters,
        'train_cfg.val_interval': iters,
        'default_hooks.checkpoint.interval': iters,
    }
    for split in ('train', 'val', 'test'):
        options |= {
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
            f'{split}_dataloader.dataset.data_root': str(data_root),
        }
    for split in ('val', 'test'):
        options[f'{split}_dataloader.dataset.pipeline.1.scale'] = (64, 64)
    return options


def as_arguments(options: dict) -> list[str]:
    return ['--cfg-options', *(f'{key}={value}'.replace(' ', '') for key, value in options.items())]


def tiny_config(data_root: str | Path, work_dir: str | Path, **options) -> Config:
    """Load the ADE20K config of the smallest released network, made to run in seconds."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(dict(tiny_options(data_root), **options))
    cfg.work_dir = str(work_dir)
    return cfg


def config_to_load_into(data_root: str | Path, work_dir: str | Path, **options) -> Config:
    """Load it so that it trains for one iteration, and neither validates nor saves."""
    quiet = {
        'val_cfg': None,
        'val_dataloader': None,
        'val_evaluator': None,
        'default_hooks.checkpoint.interval': -1,
        'default_hooks.checkpoint.save_last': False,
    }
    return tiny_config(data_root, work_dir, **{**quiet, **options})


def build_model(cfg: Config) -> nn.Module:
    """Build the segmentor or detector of a config."""
    init_default_scope(cfg.default_scope)
    importlib.import_module(f'{cfg.default_scope}.models')
    return MODELS.build(cfg.model)
