"""Files decoded as mm decodes them: their size, which EXIF may turn, and their bits."""

import itertools

import cv2
import mmcv
import numpy as np
import pytest
import tifffile
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from polynext_mm.engine.checks.decoding import Decoder, read_header
from polynext_mm.engine.results import DecodedVisualizationHook

FLAGS = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation')


def turned(path, orientation):
    """Write an image of 9 rows and 20 columns with a tag that turns or mirrors it."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.arange(180, dtype=np.uint8).reshape(9, 20)).convert('RGB')
    image.save(path, **({'tiffinfo': exif} if path.suffix == '.tif' else {'exif': exif}))
    return path.read_bytes()


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif'])
def test_the_size_is_that_of_what_mm_loads(tmp_path, suffix, backend):
    for flag, orientation in itertools.product(FLAGS, range(1, 9)):
        content = turned(tmp_path / f'image{suffix}', orientation)
        height, width = mmcv.imfrombytes(content, flag=flag, backend=backend).shape[:2]
        header = read_header(content, Decoder(flag, backend))
        assert header.size == (width, height), (flag, orientation)


def test_a_half_turn_leaves_no_size_to_compare(tmp_path):
    for orientation, told in ((1, False), (2, True), (3, True), (4, True), (6, False)):
        header = read_header(turned(tmp_path / 'image.jpg', orientation), Decoder())
        assert header.may_be_turned == told
    assert not read_header(turned(tmp_path / 'image.jpg', 3), Decoder('unchanged')).may_be_turned


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize('shape', [(8, 9), (8, 9, 3)], ids=['grey', 'colour'])
def test_bits_are_those_of_a_sample(tmp_path, dtype, suffix, shape):
    path = tmp_path / f'image{suffix}'
    cv2.imwrite(str(path), np.ones(shape, dtype))
    assert read_header(path.read_bytes(), Decoder()).bits == 8 * np.dtype(dtype).itemsize


@pytest.mark.parametrize('bands', [2, 3, 5])
def test_many_channels_are_a_picture_to_look_at(tmp_path, bands):
    path = tmp_path / 'image.tif'
    pixels = np.zeros((8, 9, bands), np.uint16)
    pixels[:4] = 4000
    tifffile.imwrite(path, pixels, photometric='minisblack', planarconfig='contig')
    picture = Decoder('unchanged', 'tifffile').picture(path.read_bytes())
    assert picture.mode == 'RGB' and picture.size == (9, 8)
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((0, 7)) == (0, 0, 0)


def test_predictions_are_drawn_into_what_the_pipeline_decodes(tmp_path):
    path = tmp_path / 'image.tif'
    pixels = np.random.default_rng(0).integers(0, 4000, (48, 64, 5)).astype(np.uint16)
    tifffile.imwrite(path, pixels, photometric='minisblack', planarconfig='contig')
    sample = SegDataSample(metainfo=dict(img_path=str(path)))
    sample.pred_sem_seg = PixelData(data=torch.ones(1, 48, 64, dtype=torch.long))
    backends = [dict(type='LocalVisBackend')]
    SegLocalVisualizer.get_instance(
        tmp_path.name, vis_backends=backends, save_dir=str(tmp_path), alpha=1.0
    ).dataset_meta = dict(classes=('soil', 'leaf'), palette=[[0, 0, 0], [10, 200, 30]])
    DecodedVisualizationHook('unchanged', 'tifffile').after_test_iter(None, 0, outputs=[sample])
    (drawn,) = tmp_path.rglob('*.png')
    assert Image.open(drawn).size == (64, 48)
    assert (10, 200, 30) in set(Image.open(drawn).getdata())
