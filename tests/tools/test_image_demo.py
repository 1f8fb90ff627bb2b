"""tools/image_demo.py draws for segmentors and detectors, and says what is wrong in one line."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).parents[2]
DETECTOR = ROOT / 'configs' / 'atss_cpolynext_t_treecrowns.py'
SEGMENTOR = ROOT / 'configs' / 'upernet_cpolynext_t_landcover.py'


@pytest.fixture(scope='module')
def image_demo():
    spec = importlib.util.spec_from_file_location('image_demo', ROOT / 'tools' / 'image_demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 112, 3), dtype=np.uint8)
    path = tmp_path / 'pictures' / 'one.png'
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    return path


def checkpoint(config, path):
    """A file as a training leaves it, of a model that has learned nothing."""
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    importlib.import_module(f'{cfg.default_scope}.models')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    metainfo = {key: value for key, value in cfg.metainfo.items()}
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=metainfo)), path)
    return path


def run(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'image_demo.py'), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_one_picture(config, picture, tmp_path):
    weights = checkpoint(config, tmp_path / 'weights.pth')
    out = tmp_path / 'new' / 'drawn.png'
    result = run(picture, config, weights, '--out', out, '--score-thr', 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == str(out)
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (96, 112, 3)
    assert (drawn != np.asarray(Image.open(picture))).any()


def test_a_folder(image_demo, picture, tmp_path, monkeypatch, capsys):
    Image.open(picture).save(picture.with_name('two.jpg'))
    (picture.parent / 'notes.txt').write_text('not a picture')
    weights = checkpoint(DETECTOR, tmp_path / 'weights.pth')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'image_demo.py',
            str(picture.parent),
            str(DETECTOR),
            str(weights),
            '--out',
            str(tmp_path / 'drawn'),
            '--device',
            'cpu',
        ],
    )
    image_demo.main()
    assert sorted(path.name for path in (tmp_path / 'drawn').iterdir()) == ['one.png', 'two.jpg']


@pytest.mark.parametrize(
    'args, message',
    [
        (['nowhere.png', DETECTOR, 'weights.pth'], 'there is no picture nowhere.png'),
        (['empty', DETECTOR, 'weights.pth'], 'there is no picture (.bmp'),
        (['one.png', 'nowhere.py', 'weights.pth'], 'there is no config nowhere.py'),
        (['one.png', 'scopeless.py', 'weights.pth'], 'default_scope must be one of'),
        (['one.png', DETECTOR, 'nowhere.pth'], 'nowhere.pth'),
        (['one.png', DETECTOR, 'weights.pth', '--out', 'drawn'], '--out: a picture ends in one of'),
        (['one.png', SEGMENTOR, 'weights.pth'], 'CheckpointError: weights.pth '),
    ],
)
def test_errors_are_one_line(image_demo, picture, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(picture.parent)
    Path('empty').mkdir()
    Path('scopeless.py').write_text('model = dict()\n')
    checkpoint(DETECTOR, 'weights.pth')
    monkeypatch.setattr(sys, 'argv', ['image_demo.py', *map(str, args), '--device', 'cpu'])
    with pytest.raises(SystemExit) as exit_info:
        image_demo.main()
    assert message in exit_info.value.code and '\n' not in exit_info.value.code
