"""tools/image_demo.py draws for segmentors and detectors, and reports errors in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope
from PIL import Image

from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.programs import call_tool

pytestmark = pytest.mark.heavy

DETECTOR = ROOT / 'configs' / 'atss_cpolynext_materials.py'
SEGMENTOR = ROOT / 'configs' / 'upernet_cpolynext_materials.py'


@pytest.fixture(scope='module')
def detector_weights(tmp_path_factory):
    return checkpoint(DETECTOR, tmp_path_factory.mktemp('detector') / 'weights.pth')


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 112, 3), dtype=np.uint8)
    path = tmp_path / 'images' / 'one.png'
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    return path


def checkpoint(config: Path, path: Path) -> Path:
    """Write a checkpoint as a training does, of a model that has learned nothing."""
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    state_dict = build_model(cfg).state_dict()
    torch.save(dict(state_dict=state_dict, meta=dict(dataset_meta=dict(cfg.metainfo))), path)
    return path


@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_one_image(config, image, tmp_path, capsys):
    weights = checkpoint(config, tmp_path / 'weights.pth')
    out = tmp_path / 'new' / 'drawn.png'
    options = ['--score-thr', 0, '--no-legend']
    if config == DETECTOR:
        options += ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    assert call_tool('image_demo', image, config, weights, '--out', out, *options) is None
    assert str(out) in capsys.readouterr().out.split()
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (96, 112, 3)
    assert (drawn != np.asarray(Image.open(image))).any()


def test_a_folder(image, tmp_path, detector_weights):
    Image.open(image).save(image.with_name('two.jpg'))
    image.with_name('notes.txt').write_text('not an image')
    drawn = tmp_path / 'drawn'
    arguments = (image.parent, DETECTOR, detector_weights, '--out', drawn, '--device', 'cpu')
    assert call_tool('image_demo', *arguments) is None
    assert sorted(path.name for path in drawn.iterdir()) == ['one.png', 'two.jpg']


def test_a_visualizer_of_the_process_is_left_alone(image, tmp_path, detector_weights):
    cfg = Config.fromfile(DETECTOR)
    init_default_scope('mmdet')
    earlier = VISUALIZERS.build(cfg.visualizer)
    out = tmp_path / 'drawn.png'
    arguments = (image, DETECTOR, detector_weights, '--out', out, '--device', 'cpu')
    assert call_tool('image_demo', *arguments) is None
    assert out.is_file()
    assert VISUALIZERS.build(cfg.visualizer) is earlier


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['nowhere.png', DETECTOR, 'weights.pth'], 'there is no image nowhere.png'),
        (['empty', DETECTOR, 'weights.pth'], 'no image (.bmp'),
        (['one.png', 'nowhere.py', 'weights.pth'], 'there is no config nowhere.py'),
        (['one.png', 'scopeless.py', 'weights.pth'], 'default_scope must be one of mmseg, mmdet'),
        (['one.png', DETECTOR, 'nowhere.pth'], 'nowhere.pth'),
        (['one.png', DETECTOR, 'weights.pth', '--out', 'drawn'], '--out must end in one of .bmp'),
        (['one.png', SEGMENTOR, 'weights.pth'], 'CheckpointError: weights.pth '),
    ],
)
def test_errors_are_one_line(image, monkeypatch, detector_weights, arguments, message):
    monkeypatch.chdir(image.parent)
    Path('empty').mkdir()
    Path('scopeless.py').write_text('model = dict()\n')
    Path('weights.pth').symlink_to(detector_weights)
    error = call_tool('image_demo', *arguments, '--device', 'cpu')
    assert message in error and '\n' not in error
