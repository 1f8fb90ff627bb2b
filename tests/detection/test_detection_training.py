"""Detectors through tools/train.py and tools/test.py, on generated data in COCO's layout."""

import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from tests.coco_sample import SHAPES, data_options, make_coco
from tests.detection.detectors import batch, losses
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT, mm_folder
from tests.helpers.programs import call_tool, free_port, python

MASK_RCNN = ROOT / 'configs' / 'mask_rcnn_cpolynext_t_coco_1x.py'
GIB = 2**30


def coco_classes():
    return importlib.import_module('mmdet.datasets').CocoDataset.METAINFO['classes']


def average_precisions(work_dir: Path) -> dict[str, float]:
    """Return the metrics of the last evaluation in a work dir, by name: 'bbox_mAP' and so on."""
    newest = max(work_dir.glob('*/*.json'))  # its name is the time of its start
    return {
        name.removeprefix('coco/'): value for name, value in json.loads(newest.read_text()).items()
    }


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Train and resume under DDP, without find_unused_parameters."""
    root = make_coco(tmp_path / 'coco', coco_classes())
    command = [
        '-m',
        'torch.distributed.run',
        '--nproc-per-node',
        2,
        '--master-port',
        free_port(),
        ROOT / 'tools' / 'train.py',
        MASK_RCNN,
        '--launcher',
        'pytorch',
        '--verbose',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *data_options(root),
        'train_dataloader.batch_size=1',
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'model.backbone.init_cfg=None',
        'model.train_cfg.rcnn.sampler.num=16',
        'model.test_cfg.rpn.max_per_img=50',
        'default_hooks.logger.interval=1',
    ]
    log = python(*command, 'train_cfg.max_epochs=1')
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()
    assert re.search(r'Epoch\(train\) +\[1\]\[2/2\]', log)
    command.insert(command.index('--work-dir'), '--resume')
    log = python(*command, 'train_cfg.max_epochs=2')
    assert re.findall(r'Epoch\(train\) +(\[.\])\[2/2\]', log) == ['[2]']


def test_without_coco_one_screen_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = call_tool('train', MASK_RCNN)
    assert message.startswith('DatasetNotFoundError: ') and message.count('\n') < 20
    for part in ('data/coco', 'cocodataset.org', 'instances_train2017.json', 'make demo-detection'):
        assert part in message
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.heavy
@pytest.mark.parametrize('order', itertools.permutations(['mmseg', 'mmdet']), ids=' then '.join)
def test_both_tasks_in_one_process(order, tmp_path):
    """A segmentor and a detector both work after both were built."""
    runners = {}
    for scope in order:
        name = {'mmseg': 'upernet_cpolynext_t_ade20k', 'mmdet': 'retinanet_cpolynext_t_coco_1x'}[
            scope
        ]
        cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        cfg.model.backbone.init_cfg = None
        cfg.work_dir = str(tmp_path / scope)
        cfg.experiment_name = f'{"-".join(order)}-{scope}'
        runners[scope] = Runner.from_cfg(cfg)
        wrapper = runners[scope].build_optim_wrapper(cfg.optim_wrapper)
        assert type(wrapper).__name__ == 'AutocastOptimWrapper'
    detector, segmentor = runners['mmdet'].model, runners['mmseg'].model
    assert type(detector).__module__.startswith('mmdet.')
    assert type(segmentor).__module__.startswith('mmseg.')
    assert type(detector.backbone) is type(segmentor.backbone)
    assert detector.train().loss(torch.randn(1, 3, 96, 96), batch()['data_samples'])
    with torch.no_grad():
        assert segmentor.eval()(torch.randn(1, 3, 64, 64))[0].shape[0] == 150


def test_the_worked_example_of_the_docs(tmp_path):
    """The ATSS of docs/detection.md, among mmdet's own configs."""
    (example,) = re.findall(
        r'```python\n(_base_.*?)```', (ROOT / 'docs' / 'detection.md').read_text(), flags=re.DOTALL
    )
    assert len(example.splitlines()) <= 20  # a glance, as ruff formats it
    for part in ('_base_', 'atss'):
        shutil.copytree(mm_folder('mmdet') / 'configs' / part, tmp_path / part)
    path = tmp_path / 'atss' / 'atss_cpolynext_t.py'
    path.write_text(example)
    cfg = Config.fromfile(path)
    model = build_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    loss, _ = losses(model.train(), wrapper, batch())
    wrapper.backward(loss)
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    wrapper.step()
    assert losses(model, wrapper, batch())[0].isfinite()


@pytest.mark.slow
def test_mask_rcnn_learns_masks(tmp_path):
    """It overfits a few images with masks from polygons and run lengths, by COCO's metric."""
    root = make_coco(tmp_path / 'coco', SHAPES, train=6, val=0)
    annotations = f'{root}/annotations/instances_train2017.json'
    config = tmp_path / 'mask_rcnn_shapes.py'
    config.write_text(
        textwrap.dedent(f"""
        _base_ = '{MASK_RCNN}'
        metainfo = dict(classes={SHAPES})
        train_pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs')]
        test_pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale_factor=1.),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
        loader = dict(num_workers=0, persistent_workers=False)
        train_dataloader = dict(dataset=dict(
            data_root='{root}', metainfo=metainfo, pipeline=train_pipeline), **loader)
        val_dataloader = dict(dataset=dict(
            data_root='{root}', metainfo=metainfo, pipeline=test_pipeline,
            ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/')),
            **loader)
        test_dataloader = val_dataloader
        val_evaluator = dict(ann_file='{annotations}')
        test_evaluator = val_evaluator
        model = dict(
            backbone=dict(drop_path_rate=0., init_cfg=None),
            roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)),
            train_cfg=dict(rcnn=dict(sampler=dict(num=64))))
        epochs = 32
        optim_wrapper = dict(
            dtype='float32', optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=5.))
        param_scheduler = [
            dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
            dict(type='MultiStepLR', by_epoch=True, begin=0, end=epochs, milestones=[26])]
        train_cfg = dict(max_epochs=epochs, val_interval=epochs)
        default_hooks = dict(checkpoint=dict(interval=epochs))
        randomness = dict(seed=0)
        """)
    )
    work_dir = tmp_path / 'work'
    python(ROOT / 'tools' / 'train.py', config, '--work-dir', work_dir)
    log = python(
        ROOT / 'tools' / 'test.py',
        config,
        work_dir / 'epoch_32.pth',
        '--work-dir',
        work_dir,
        '--out',
        tmp_path / 'found.pkl',
        '--show-dir',
        tmp_path / 'drawn',
        '--cfg-options',
        'test_evaluator.classwise=True',
    )
    found = average_precisions(work_dir)
    assert found['segm_mAP_50'] > 0.5 and found['segm_mAP'] > 0.25 and found['bbox_mAP_50'] > 0.5, (
        found
    )
    assert all(f'| {shape}' in log for shape in SHAPES)
    assert len(pickle.loads((tmp_path / 'found.pkl').read_bytes())) == 6
    assert len(list((tmp_path / 'drawn').iterdir())) == 6


@pytest.mark.slow
def test_a_full_size_step_within_24_gib(tmp_path):
    root = make_coco(tmp_path / 'coco', coco_classes(), train=1, val=1, size=(1333, 800))
    command = [
        sys.executable,
        ROOT / 'tools' / 'train.py',
        ROOT / 'configs' / 'mask_rcnn_apolynext_s_coco_1x.py',
        '--verbose',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *data_options(root),
        'train_dataloader.batch_size=1',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=2',
        'model.backbone.init_cfg=None',
        'default_hooks.logger.interval=1',
    ]
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    text = (tmp_path / 'log').read_text()
    assert status == 0, text[-4000:]
    (loss,) = re.findall(r'Epoch\(train\) +\[1\]\[1/1\].* loss: ([\d.]+)', text)
    assert 0 < float(loss) < 100
    print(f'{usage.ru_maxrss * 1024 / GIB:.1f} GiB')  # kilobytes, on Linux
    assert usage.ru_maxrss * 1024 < 24 * GIB
