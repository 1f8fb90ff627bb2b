"""demo/detection.py goes from training to the table and the pictures."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from tests.helpers.files import ROOT
from tests.helpers.programs import python, script

detection = script('demo/detection')
segmentation = script('demo/segmentation')

SHORT = ROOT / 'configs' / 'atss_cpolynext_materials.py'
LEFT_BY_MAKE_DEMO = 'upernet_cpolynext_materials/iter_1600.pth'


def test_the_pretrained_config_starts_from_what_make_demo_leaves():
    segmentor = Config.fromfile(segmentation.CONFIG)
    backbone = Config.fromfile(detection.PRETRAINED).model.backbone
    assert segmentation.CONFIG.stem == 'upernet_cpolynext_materials'
    assert segmentor.train_cfg.max_iters == segmentor.default_hooks.checkpoint.interval == 1600
    assert backbone.init_cfg.checkpoint == f'work_dirs/{LEFT_BY_MAKE_DEMO}'
    assert backbone.arch == segmentor.model.backbone.arch


def test_the_pretrained_config_differs_in_its_start_alone():
    pretrained, short = Config.fromfile(detection.PRETRAINED), Config.fromfile(SHORT)
    assert short.model.backbone.init_cfg is None
    pretrained.model.backbone.init_cfg = None
    assert pretrained.to_dict() == short.to_dict()


def test_the_fourth_stage_alone_gets_no_gradient():
    cfg = Config.fromfile(SHORT)
    backbone = MODELS.build(cfg.model.backbone)
    sum(out.sum() for out in backbone(torch.ones(1, 3, 64, 64))).backward()
    idle = {name for name, param in backbone.named_parameters() if param.grad is None}
    fourth = {f'stages.3.{name}' for name, _ in backbone.stages[3].named_parameters()}
    assert idle == fourth
    assert cfg.find_unused_parameters  # or several processes stop in their second iteration


def test_a_segmentor_is_trained_where_there_is_none(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(detection, 'run_tool', lambda *args: calls.append(args))
    checkpoint = detection.segmentor(tmp_path, 3)
    assert checkpoint == tmp_path / LEFT_BY_MAKE_DEMO
    assert calls == [
        (
            'train.py',
            segmentation.CONFIG,
            '--work-dir',
            checkpoint.parent,
            '--cfg-options',
            'randomness.seed=3',
        )
    ]
    assert f'There is no {checkpoint}' in capsys.readouterr().out
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b'')
    assert detection.segmentor(tmp_path, 3) == checkpoint
    assert len(calls) == 1


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['detection.py', '--backbone', str(tmp_path / 'a.pth')])
    with pytest.raises(SystemExit):
        detection.parse_args()
    assert f'--backbone: there is no checkpoint {tmp_path / "a.pth"}' in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_look(tmp_path):
    script('demo/make_materials').make_scenes()
    folder = tmp_path / 'segmentor'
    options = ['--cfg-options', *segmentation.shortened(2)]
    python(ROOT / 'tools' / 'train.py', segmentation.CONFIG, '--work-dir', folder, *options)
    backbone = folder / 'iter_2.pth'
    demo = ROOT / 'demo' / 'detection.py'
    printed = python(demo, '--seconds', 2, '--work-dir', tmp_path, '--backbone', backbone)
    names = '|'.join(detection.NAMES.values())
    rows = re.findall(rf'^({names}) +(\d+) +\d+ +([\d.]+) +([\d.]+)$', printed, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(detection.NAMES.values())
    assert all(int(iterations) >= 2 for _, iterations, *_ in rows)
    assert f'the backbone starts from {backbone}' in printed
    log = min((tmp_path / detection.PRETRAINED.stem).glob('*/*.log')).read_text()
    assert re.search(rf'PolyNeXt: loaded (\d+) of \1 tensors from {backbone}', log)
    for config in detection.NAMES:
        assert len(list((tmp_path / config.stem / 'pictures').glob('*.jpg'))) == 100
