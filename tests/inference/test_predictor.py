"""Predictor: every kind of input, in any order, gives what the command gives."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import polynext_mm
from polynext_mm.engine.checks.config import ConfigError
from polynext_mm.engine.checks.findings import DataError
from tests.small_models import CLASSES, PALETTE, write_detector, write_segmentor

TTA = """
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
    [dict(type='Resize', scale_factor=f, keep_ratio=True) for f in (1.0, 1.5)],
    [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
    [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
"""


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    config, weights = write_segmentor(tmp_path_factory.mktemp('segmentor'))
    config.write_text(config.read_text() + TTA)
    return config, weights


@pytest.fixture(scope='module')
def segment(segmentor):
    return polynext_mm.Predictor(*segmentor, device='cpu')


@pytest.fixture(scope='module')
def detect(tmp_path_factory):
    model = write_detector(tmp_path_factory.mktemp('detector'))
    return polynext_mm.Predictor(*model, device='cpu', score_thr=0.0)


def noise(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def kinds(pixels: np.ndarray, folder: Path) -> dict:
    """One RGB image in every form, with the arguments that go with it."""
    path = folder / 'image.png'
    Image.fromarray(pixels).save(path)
    channels_first = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return {
        'path': (path, {}),
        'name': (str(path), {}),
        'rgb': (pixels, {}),
        'bgr': (pixels[..., ::-1], dict(channel_order='bgr')),
        'pil': (Image.fromarray(pixels), {}),
        'tensor': (channels_first, {}),
        'floats': (channels_first / 255, {}),
        'float array': (pixels.astype(np.float64), {}),
    }


def found(result) -> np.ndarray:
    return (
        result.labels
        if isinstance(result.labels, np.ndarray) and result.labels.ndim == 2
        else (np.concatenate([result.boxes, result.scores[:, None]], 1))
    )


@pytest.mark.heavy
@pytest.mark.parametrize('which', ['segment', 'detect'])
def test_every_kind_of_input_in_any_order(which, request, tmp_path):
    predictor = request.getfixturevalue(which)
    inputs = kinds(noise(), tmp_path)
    expected = predictor(inputs['path'][0])
    calls = random.Random(0).choices(list(inputs), k=50 - len(inputs)) + list(inputs)
    for kind in calls:  # fifty for each of two models
        image, options = inputs[kind]
        result = predictor(image, **options)
        np.testing.assert_allclose(found(result), found(expected), atol=1e-3, err_msg=kind)
        assert (result.image == noise()).all(), kind


def test_lists_batches_and_generators(segment):
    images = [noise(seed=seed) for seed in range(3)]
    alone = [segment(image).labels for image in images]
    for many in (images, tuple(images), np.stack(images)):
        results = segment(many)
        assert isinstance(results, list)
        assert all((result.labels == one).all() for result, one in zip(results, alone))
    lazily = segment(image for image in images)
    assert (next(lazily).labels == alone[0]).all() and len(list(lazily)) == 2
    assert segment([]) == []


def test_images_of_several_sizes_in_batches(segmentor, segment):
    batched = polynext_mm.Predictor(*segmentor, device='cpu', batch_size=3)
    sizes = [(48, 64), (48, 64), (64, 48), (48, 64), (40, 40)]
    images = [noise(*size, seed=index) for index, size in enumerate(sizes)]
    results = batched(images)
    assert [result.labels.shape for result in results] == sizes
    agreement = [(r.labels == segment(i).labels).mean() for r, i in zip(results, images)]
    assert min(agreement) > 0.99


def test_a_segmentation(segment, tmp_path):
    result = segment(noise(), logits=True)
    assert result.classes == CLASSES and list(map(list, result.palette)) == PALETTE
    assert result.labels.shape == (48, 64) and result.labels.dtype == np.uint8
    assert (result.logits.argmax(0) == result.labels).all()
    assert segment(noise()).logits is None
    assert sum(result.shares.values()) == pytest.approx(1)
    result.save_labels(tmp_path / 'new' / 'ids.png')
    assert (np.asarray(Image.open(tmp_path / 'new' / 'ids.png')) == result.labels).all()
    plain = np.asarray(result.draw(opacity=0, legend=False))
    assert (plain == noise()).all()
    half = np.asarray(result.draw(legend=False), int)
    colours = np.array(PALETTE)[result.labels]
    assert abs(half - (colours + noise()) / 2).max() <= 0.5
    assert result.draw().height > 48
    result.save(tmp_path / 'deep' / 'drawn.png')
    assert (np.asarray(Image.open(tmp_path / 'deep' / 'drawn.png')) == result.draw()).all()


def coco_of(result, path: Path) -> COCO:
    coco = COCO()
    coco.dataset = result.to_coco()
    coco.createIndex()
    return coco


def test_a_segmentation_in_cocos_format(segment, tmp_path):
    result = segment(noise())
    coco = coco_of(result, tmp_path)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        assert (mask == (result.labels == annotation['category_id'] - 1)).all()
        assert coco.cats[annotation['category_id']]['name'] in result.shares
    assert len(coco.anns) == len(result.shares)


def test_detections(detect, tmp_path):
    image = noise()
    result = detect(image)
    count = len(result)
    assert count and result.boxes.shape == (count, 4) and result.masks.shape == (count, 48, 64)
    assert (np.diff(result.scores) <= 0).all()
    assert set(result.labels) <= {0, 1, 2} and result.classes == CLASSES
    coco = coco_of(result, tmp_path)
    assert [a['score'] for a in coco.anns.values()] == pytest.approx(result.scores.tolist())
    assert all(a['area'] == coco.annToMask(a).sum() for a in coco.anns.values())
    for legend in (True, False):
        drawn = np.asarray(result.draw(legend=legend))
        assert drawn.shape == image.shape and (drawn != image).any()
    with pytest.raises(ValueError, match='logits=True: a detector has none'):
        detect(image, logits=True)


def test_half_precision_and_sliding_windows(segmentor, segment):
    image = noise()
    half = polynext_mm.Predictor(*segmentor, device='cpu', dtype=torch.bfloat16)
    assert (half(image).labels == segment(image).labels).mean() > 0.7
    windows = polynext_mm.Predictor(*segmentor, device='cpu', slide=32)
    assert windows(noise(100, 70)).labels.shape == (100, 70)


def test_test_time_augmentation(segmentor):
    predictor = polynext_mm.Predictor(*segmentor, device='cpu', tta=True, batch_size=2)
    results = predictor([noise(seed=0), noise(seed=1), noise(10, 10)])
    assert [result.labels.shape for result in results] == [(48, 64), (48, 64), (10, 10)]
    with pytest.raises(ValueError, match='tta averages probabilities'):
        predictor(noise(), logits=True)


@pytest.mark.parametrize('size', [(1, 1), (5, 200), (31, 33)])
def test_images_that_are_too_small_are_widened(segmentor, segment, size):
    keep = polynext_mm.Predictor(*segmentor, device='cpu', slide=64)
    options = {'model.data_preprocessor.test_cfg': dict(size_divisor=32)}  # pads them itself
    padded = polynext_mm.Predictor(*segmentor, device='cpu', slide=64, cfg_options=options)
    for predictor in (segment, keep, padded):
        assert predictor(noise(*size)).labels.shape == size


def test_grey_images_and_images_turned_by_exif(segment, tmp_path):
    grey = noise()[..., 0]
    repeated = np.repeat(grey[..., None], 3, -1)
    assert (segment(grey).labels == segment(repeated).labels).all()
    assert (segment(Image.fromarray(grey)).labels == segment(repeated).labels).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(tmp_path / 'turned.png', exif=exif)
    path = tmp_path / 'turned.png'
    assert (segment(path).labels == segment(Image.open(path)).labels).all()


def test_a_model_of_one_logit(tmp_path):
    config, weights = write_segmentor(tmp_path)
    text = config.read_text().replace('num_classes=3', 'num_classes=2, out_channels=1')
    config.write_text(text)
    state = torch.load(weights)
    for key in list(state['state_dict']):
        if 'conv_seg' in key:
            state['state_dict'][key] = state['state_dict'][key][:1]
    state['meta']['dataset_meta'] = dict(classes=('no', 'yes'), palette=PALETTE[:2])
    torch.save(state, weights)
    result = polynext_mm.Predictor(config, weights, device='cpu')(noise(), logits=True)
    assert set(np.unique(result.labels)) <= {0, 1} and result.logits.shape == (1, 48, 64)
    assert set(result.shares) <= {'no', 'yes'} and result.draw().height > 48


@pytest.mark.parametrize(
    ('image', 'options', 'message'),
    [
        (np.zeros((0, 5, 3), np.uint8), {}, r'has the shape \(height, width, 3\), got \(0, 5, 3\)'),
        (torch.zeros(64, 48, 3), {}, r'shape \(channels, height, width\), got \(64, 48, 3\)'),
        (noise(), dict(channel_order='gbr'), "'rgb' or 'bgr', got 'gbr'"),
        (noise() > 5, {}, 'values from 0 to 255, got the dtype bool'),
        (noise().repeat(2, -1)[..., :4], {}, 'takes images of 3 channels, got 4'),
        (noise().astype(np.uint16) * 257, {}, 'from 0 to 255, got .*: divide those of 16 bits'),
        (Image.fromarray(noise()[..., 0].astype(np.uint16) * 257), {}, 'divide those of 16 bits'),
        (noise().astype(int) - 300, {}, 'from 0 to 255, got -'),
        (np.full((64, 64, 3), np.nan), {}, 'got nan or inf'),
        ([3], {}, 'not a int'),
    ],
)
def test_what_is_no_image_is_refused(segment, image, options, message):
    with pytest.raises(ValueError, match=message):
        segment(image, **options)


def test_files_that_cannot_be_read_are_named(segment, tmp_path):
    with pytest.raises(DataError, match='there is no .*absent.png'):
        segment(tmp_path / 'absent.png')


def test_a_work_dir(segmentor, tmp_path):
    config, weights = segmentor
    folder = tmp_path / 'mine'
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r'has no config \(\*.py\)'):
        polynext_mm.Predictor(folder)
    (folder / 'mine.py').write_text(f"_base_ = '{config}'\n")
    with pytest.raises(FileNotFoundError, match=f'no checkpoint in .*; {folder} has none'):
        polynext_mm.Predictor(folder)
    (folder / 'iter_5.pth').write_bytes(weights.read_bytes())
    assert polynext_mm.Predictor(folder, device='cpu').classes == CLASSES
    for name in ('best', 'iter_6.pth'):
        with pytest.raises(FileNotFoundError, match='has iter_5.pth'):
            polynext_mm.Predictor(folder, name)
    with pytest.raises(ConfigError, match='no tta_model and tta_pipeline'):
        polynext_mm.Predictor(folder, tta=True, cfg_options={'tta_model': None})
