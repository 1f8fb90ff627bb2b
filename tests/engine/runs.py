"""Trainings of a second or two, of the sample configs with the tiny network: everything random in
them is on (augmentation, dropout, drop path)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.helpers.files import ROOT
from tests.helpers.samples import few_scenes
from tests.helpers.tiny import TINY_ARCH

WIDTHS = list(TINY_ARCH['widths'])
_numbers = itertools.count()
SEGMENTATION = ROOT / 'configs' / 'upernet_cpolynext_materials.py'
DETECTION = ROOT / 'configs' / 'atss_cpolynext_materials.py'
AUGMENTED = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(128, 128), ratio_range=(0.8, 1.3), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(96, 96), allow_negative_crop=True),
    dict(type='PhotoMetricDistortion'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]


def options(task: str, iters: int = 6, by_epoch: bool = False, **settings) -> dict:
    """Settings, as of --cfg-options, for the tiny runs of a task, 'segmentation' or 'detection'.

    By iteration, it saves every second iteration and validates every third; by epoch there are
    ``iters`` epochs of two iterations, with a checkpoint and a validation each.
    """
    data_root = f'{few_scenes()}/'
    tiny = {
        'model.backbone.arch': dict(TINY_ARCH, _delete_=True),
        'model.backbone.drop_path_rate': 0.3,
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.data_root': data_root,
        'val_dataloader.dataset.data_root': data_root,
        'test_dataloader.dataset.data_root': data_root,
        'train_dataloader.dataset.indices': 4,
        'val_dataloader.dataset.indices': 2,
        'default_hooks.logger.interval': 100,
        'randomness.seed': 3,
    }
    if task == 'segmentation':
        tiny |= {
            'model.data_preprocessor.size': (64, 64),
            'train_dataloader.dataset.pipeline.2.crop_size': (64, 64),
            'model.decode_head.in_channels': WIDTHS,
            'model.decode_head.channels': 8,
            'model.decode_head.dropout_ratio': 0.1,
            'model.auxiliary_head.in_channels': WIDTHS[2],
            'model.auxiliary_head.channels': 8,
            'default_hooks.checkpoint.save_best': 'mIoU',
        }
    else:
        tiny |= {
            'model.backbone.out_indices': (1, 2, 3),
            'model.neck.in_channels': WIDTHS[1:],
            'model.neck.out_channels': 16,
            'model.bbox_head.in_channels': 16,
            'model.bbox_head.feat_channels': 16,
            'model.bbox_head.stacked_convs': 1,
            'model.bbox_head.anchor_generator.strides': [8, 16, 32],
            'train_dataloader.dataset.pipeline': AUGMENTED,
            'val_evaluator.ann_file': f'{data_root}annotations/instances_tuning.json',
            'test_evaluator.ann_file': f'{data_root}annotations/instances_test.json',
            'default_hooks.checkpoint.save_best': 'coco/bbox_mAP',
        }
    if by_epoch:
        tiny |= {
            'train_cfg': dict(
                _delete_=True, type='EpochBasedTrainLoop', max_epochs=iters, val_interval=1
            ),
            'train_dataloader.sampler.type': 'DefaultSampler',
            'default_hooks.checkpoint.by_epoch': True,
            'default_hooks.checkpoint.interval': 1,
            'log_processor.by_epoch': True,
        }
        if task == 'detection':
            tiny['train_dataloader.batch_sampler'] = dict(
                _delete_=True, type='AspectRatioBatchSampler'
            )
    else:
        tiny |= {
            'train_cfg.max_iters': iters,
            'train_cfg.val_interval': 3,
            'default_hooks.checkpoint.interval': 2,
        }
    return tiny | settings


def config(task: str, work_dir: Path, report: bool = False, **settings) -> Config:
    """The config of such a run, which draws pictures for its report alone."""
    cfg = Config.fromfile(SEGMENTATION if task == 'segmentation' else DETECTION)
    if not report:
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != 'ReportHook']
    cfg.merge_from_dict(options(task, **settings))
    cfg.work_dir = str(work_dir)
    # mmengine names loggers by experiment and second: two runs in one second would share a log
    cfg.experiment_name = f'run_{next(_numbers)}'
    return cfg


class At(Hook):
    """Calls ``act`` at a hook point once the run has so many iterations done."""

    priority = 'HIGHEST'

    def __init__(self, point: str, iteration: int, act: Callable[[Runner], None]):
        self.iteration, self.act = iteration, act
        setattr(self, point, self._at)

    def _at(self, runner: Runner, **step: object) -> None:
        if runner.iter == self.iteration:
            self.act(runner)


def train(cfg: Config, resume: bool | str = False, hooks: Iterable[Hook] = ()) -> Runner:
    """Train as tools/train.py does, in this process."""
    if resume:
        cfg.resume = True
        cfg.load_from = None if resume is True else str(resume)
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def saved(path: Path) -> dict:
    return torch.load(path, weights_only=False)


STATES = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'polynext_resume')


def differences(one: dict, other: dict) -> list[str]:
    """Where two checkpoints differ in what training goes on from, bit for bit."""
    return [
        name
        for key in STATES
        for name in _differences(one.get(key), other.get(key), key)
        if not name.endswith('saved_at')
    ]


def _differences(one, other, name: str) -> list[str]:
    if type(one) is not type(other):
        return [name]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, dict):
        found = [f'{name}.{key}' for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += _differences(one[key], other[key], f'{name}.{key}')
        return found
    if isinstance(one, (list, tuple)):
        found = [] if len(one) == len(other) else [name]
        for place, (left, right) in enumerate(zip(one, other)):
            found += _differences(left, right, f'{name}.{place}')
        return found
    return [] if one == other else [name]
