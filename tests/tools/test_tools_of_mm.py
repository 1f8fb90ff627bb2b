"""A config elsewhere, with custom_imports alone, under the training tools of mmseg and mmdet."""

import textwrap
from pathlib import Path

import pytest
import torch

from polynext_mm.commands import main
from tests.coco_sample import make_coco
from tests.helpers.files import mm_folder
from tests.helpers.programs import python
from tests.helpers.samples import sample_as_ade20k
from tests.helpers.tiny import TINY_ARCH

BACKBONE = f"""
custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)
backbone = dict(_delete_=True, type='PolyNeXt', arch={TINY_ARCH!r}, drop_path_rate=.1)
"""


def is_trained(work_dir: Path) -> bool:
    content = torch.load(work_dir / 'iter_1.pth', weights_only=False)
    return (
        content['meta']['iter'] == 1
        and 'backbone.stages.3.cells.0.gate_logits' in content['state_dict']
        and all(value.isfinite().all() for value in content['state_dict'].values())
    )


@pytest.mark.slow
def test_mmsegs_train(tmp_path):
    data_root = sample_as_ade20k(tmp_path)
    configs, train = (mm_folder('mmseg') / part for part in ('configs', 'tools/train.py'))
    config = tmp_path / 'mine' / 'config.py'
    config.parent.mkdir()
    config.write_text(
        BACKBONE
        + textwrap.dedent(f"""
        _base_ = ['{configs}/_base_/models/upernet_r50.py',
                  '{configs}/_base_/default_runtime.py']
        norm = dict(type='BN')
        model = dict(
            pretrained=None, backbone=backbone, data_preprocessor=dict(size=(64, 64)),
            decode_head=dict(in_channels=[8, 16, 16, 24], channels=8, num_classes=6, norm_cfg=norm),
            auxiliary_head=dict(in_channels=16, channels=8, num_classes=6, norm_cfg=norm))
        pipeline = [dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', reduce_zero_label=True),
                    dict(type='PackSegInputs')]
        train_dataloader = dict(
            batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
            dataset=dict(type='BaseSegDataset', data_root='{data_root}', pipeline=pipeline,
                         metainfo=dict(classes=tuple('abcdef')), reduce_zero_label=True,
                         data_prefix=dict(img_path='images/training',
                                          seg_map_path='annotations/training')))
        train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
        optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
        default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
        """)
    )
    python(train, 'mine/config.py', '--work-dir', 'work', cwd=tmp_path)
    assert is_trained(tmp_path / 'work')


@pytest.mark.heavy
def test_mmdets_train_by_run(tmp_path):
    configs, train = (mm_folder('mmdet') / part for part in ('configs', 'tools/train.py'))
    data_root = make_coco(tmp_path / 'data', ('one', 'two'), train=2, val=1)
    (tmp_path / 'config.py').write_text(
        BACKBONE
        + textwrap.dedent(f"""
        _base_ = ['{configs}/_base_/models/retinanet_r50_fpn.py',
                  '{configs}/_base_/default_runtime.py']
        model = dict(
            backbone=dict(backbone, out_indices=(1, 2, 3)),
            neck=dict(in_channels=[16, 16, 24], out_channels=16, start_level=0),
            bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16))
        pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                    dict(type='PackDetInputs')]
        train_dataloader = dict(
            batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
            dataset=dict(type='CocoDataset', data_root='{data_root}', pipeline=pipeline,
                         metainfo=dict(classes=('one', 'two')),
                         ann_file='annotations/instances_train2017.json',
                         data_prefix=dict(img='train2017/')))
        train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
        optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
        default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
        """)
    )
    python('-m', 'polynext_mm', 'run', train, 'config.py', '--work-dir', 'work', cwd=tmp_path)
    assert is_trained(tmp_path / 'work')


# python -m polynext_mm run


@pytest.mark.heavy
def test_run_gives_a_script_its_arguments_and_its_folder(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'neighbour.py').write_text('value = 3')
    script = tmp_path / 'scripts' / 'script.py'
    script.write_text(
        'import sys, neighbour\n'
        'print(__name__, sys.argv, neighbour.value, "polynext_mm" in sys.modules)'
    )
    printed = python('-m', 'polynext_mm', 'run', 'scripts/script.py', '--flag', 'a b', cwd=tmp_path)
    assert printed.splitlines()[-1] == "__main__ ['scripts/script.py', '--flag', 'a b'] 3 True"


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('script.py',), "there is no command 'script.py'"),
        (('run',), 'the following arguments are required: script'),
        (('run', 'absent.py'), 'there is no script absent.py'),
    ],
)
def test_run_tells_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert message in capsys.readouterr().err + str(end.value)
