"""A file that cannot be learnt from: one line with its name, its size, its mode and a remedy."""

import json
import re

import cv2
import numpy as np
import pytest
import tifffile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

from polynext_mm.datasets import CheckedPipeline, DataError, check_loading
from polynext_mm.datasets.own import OwnSegDataset  # noqa: F401 - registered
from polynext_mm.engine.checks.data import check_samples
from tests.coco_sample import make_coco
from tests.helpers.files import ROOT
from tests.segmentation_sample import (
    constant,
    cut_short,
    end_missing,
    image_path,
    label_path,
    make_segmentation,
    segmentation_config,
    write_label,
)


@pytest.fixture
def root(tmp_path):
    init_default_scope('mmseg')
    return make_segmentation(tmp_path)


def told(root, split='train', **options) -> str:
    """The error of reading a whole split, a single line."""
    cfg = segmentation_config(root, **options)
    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    check_loading(dataset)
    with pytest.raises(DataError) as error:
        for index in range(len(dataset)):
            dataset[index]
    message = str(error.value)
    assert '\n' not in message
    return message


def save(image: Image.Image, path, kind: str = 'PNG') -> None:
    image.save(path, kind)


def rgb_label(root, split):
    save(Image.new('RGB', (48, 40), (9, 8, 7)), label_path(root, split, 1))


def small_label(root, split):
    save(Image.new('L', (24, 20)), label_path(root, split, 1))


MISTAKES = {
    'truncated image': (
        lambda root, split: cut_short(image_path(root, split, 1)),
        ['01.jpg (', 'bytes, JPEG, 48x40, mode RGB) is cut short', 'get the file again'],
    ),
    'PNG without its end': (
        lambda root, split: end_missing(image_path(root, split, 1), 1),
        ['01.jpg (', 'bytes, PNG, 48x40', 'OpenCV cannot decode it', 'get the file again'],
    ),
    'truncated label': (
        lambda root, split: cut_short(label_path(root, split, 1)),
        ['01.png (', 'bytes, PNG, 48x40, mode L) is cut short', 'get the file again'],
    ),
    'empty image': (
        lambda root, split: image_path(root, split, 1).write_bytes(b''),
        ['01.jpg (0 bytes) is empty'],
    ),
    'web page': (
        lambda root, split: image_path(root, split, 1).write_text('<html>404</html>'),
        ['01.jpg (16 bytes) is a text or web page'],
    ),
    'git-lfs': (
        lambda root, split: label_path(root, split, 1).write_text(
            'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n'
        ),
        ['01.png', 'git lfs pull'],
    ),
    'missing label': (
        lambda root, split: label_path(root, split, 1).unlink(),
        ['there is no', '01.png'],
    ),
    'id out of range': (
        lambda root, split: write_label(root, split, 1, np.r_[[[76] * 48], constant(0)[1:]]),
        [
            '01.png (',
            'PNG, 48x40, mode L)',
            'has the ids 76 on 2.5% of its pixels, and the 4 classes have 0 to 3',
            'write 255 where a pixel is to be ignored',
        ],
    ),
    'ids from 1': (
        lambda root, split: write_label(root, split, 1, constant(4)),
        ['has the ids 4', 'set reduce_zero_label=True'],
    ),
    'RGB label': (
        rgb_label,
        ['01.png (', 'mode RGB) is a picture of 3 channels', 'colours replaced by ids'],
    ),
    'size': (small_label, ['01.png', 'has 24x20 pixels and its image 48x40']),
    '16 bits': (
        lambda root, split: write_label(root, split, 1, constant(256)),
        ['01.png', 'has ids up to 256, and mmseg keeps 8 bits'],
    ),
    'JPEG': (
        lambda root, split: save(Image.new('L', (48, 40), 1), label_path(root, split, 1), 'JPEG'),
        ['01.png', 'is a label in JPEG, whose compression changes ids', 'write the labels as PNG'],
    ),
}
TIFF_LABELS = {
    'ids up to 256': (np.full((40, 48), 256, np.uint16), 'has ids up to 256'),
    'ids up to 70000': (np.full((40, 48), 70000, np.int32), 'has ids up to 70000'),
    'no data': (np.full((40, 48), -32768, np.int16), 'has ids down to -32768'),
    'nan': (np.full((40, 48), np.nan, np.float32), 'has pixels that are no number'),
    'fractions': (np.full((40, 48), 0.5, np.float32), 'has the fraction 0.5 for an id'),
}
SOUND_LABELS = {
    '16 bits': np.full((40, 48), 3, np.uint16),
    '32 bits': np.full((40, 48), 3, np.int32),
    'floats': np.full((40, 48), 3, np.float32),
    '-1 is ignored': np.where(np.eye(40, 48), 3, -1).astype(np.int16),
}


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_bad_file_is_named_in_training_and_validation(root, mistake, split):
    make, parts = MISTAKES[mistake]
    make(root, split)
    message = told(root, split)
    for part in parts:
        assert part in message


def as_tiff(root, label):
    """Write a label in place of that of the second image, under its name."""
    path = label_path(root, 'train', 1)
    tifffile.imwrite(path.with_suffix('.tif'), label)
    path.with_suffix('.tif').replace(path)


@pytest.mark.parametrize('kind', TIFF_LABELS)
def test_a_label_whose_ids_mmseg_would_change_is_named(root, kind):
    label, part = TIFF_LABELS[kind]
    as_tiff(root, label)
    message = told(root)
    assert '01.png (' in message and part in message and 'mmseg keeps 8 bits of an id' in message


@pytest.mark.parametrize('kind', SOUND_LABELS)
def test_labels_of_any_format_pass_if_their_ids_stay(root, kind):
    label = SOUND_LABELS[kind]
    as_tiff(root, label)
    dataset = DATASETS.build(segmentation_config(root).train_dataloader.dataset)
    dataset.pipeline.transforms = dataset.pipeline.transforms[:2]
    check_loading(dataset)
    assert (dataset[1]['gt_seg_map'] == label.astype(np.uint8)).all()


def test_labels_of_a_single_pixel_are_named(root):
    save(Image.new('RGB', (1, 1)), image_path(root, 'train', 1))
    save(Image.new('L', (1, 1)), label_path(root, 'train', 1))
    assert '01.png (' in (message := told(root)) and 'has a single row or column' in message


def test_images_of_more_pixels_than_pillow_allows_are_read(root, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    dataset = DATASETS.build(segmentation_config(root).train_dataloader.dataset)
    check_loading(dataset)
    dataset[1]


def tagged(path, orientation=6):
    """Write a JPEG of 48x40 pixels that EXIF turns, under the name of an image."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.new('RGB', (48, 40)).save(path, 'JPEG', exif=exif)


def test_labels_of_unturned_images_are_told_with_the_reason(root):
    tagged(image_path(root, 'train', 1))
    message = told(root)
    assert 'has 48x40 pixels and its image 40x48, which EXIF turns' in message
    assert "color_type='color_ignore_orientation'" in message
    unturned = {'train_dataloader.dataset.pipeline.0.color_type': 'color_ignore_orientation'}
    dataset = DATASETS.build(segmentation_config(root, **unturned).train_dataloader.dataset)
    check_loading(dataset)
    dataset[1]


def test_labels_of_turned_images_pass(root):
    tagged(image_path(root, 'train', 1))
    save(Image.new('L', (40, 48)), label_path(root, 'train', 1))
    dataset = DATASETS.build(segmentation_config(root).train_dataloader.dataset)
    check_loading(dataset)
    dataset[1]


def test_exif_is_blamed_only_where_it_turned_the_image(root):
    exif = Image.Exif()
    exif[274] = 6  # which OpenCV does not obey in WebP
    Image.new('RGB', (48, 40)).save(image_path(root, 'train', 1), 'WEBP', exif=exif)
    save(Image.new('L', (40, 48)), label_path(root, 'train', 1))
    message = told(root)
    assert 'has 40x48 pixels and its image 48x40' in message and 'EXIF' not in message


@pytest.mark.parametrize('channels', [5, 3])
def test_a_tiff_that_only_tifffile_reads_is_told_with_the_setting(root, channels):
    pixels = np.random.default_rng(0).random((40, 48, channels), np.float32)
    tifffile.imwrite(root / 'x.tif', pixels, photometric='minisblack', planarconfig='contig')
    (root / 'x.tif').replace(image_path(root, 'train', 1))
    message = told(root)
    assert f'is a TIFF of shape (40, 48, {channels}) that neither Pillow nor OpenCV can' in message
    remedy = {
        'train_dataloader.dataset.pipeline.0.imdecode_backend': 'tifffile',
        'train_dataloader.dataset.pipeline.0.color_type': 'unchanged',
    }
    assert all(value in message for value in remedy.values())
    dataset = DATASETS.build(segmentation_config(root, **remedy).train_dataloader.dataset)
    dataset.pipeline.transforms = dataset.pipeline.transforms[:2]
    check_loading(dataset)
    assert dataset[1]['img'].shape == (40, 48, channels)
    image_path(root, 'train', 1).write_bytes(image_path(root, 'train', 1).read_bytes()[:200])
    assert 'is a TIFF that is cut short or damaged' in told(root)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('means', 'channels', 'message'),
    [
        (3, 5, 'have 5 channels, and model.data_preprocessor.mean has 3 numbers'),
        (1, 3, r'have 5 channels, and the backbone takes 3: set model.backbone.in_channels=5'),
        (1, 5, None),
        (5, 5, None),
    ],
)
def test_channels_are_compared_with_the_network(root, means, channels, message):
    for index in range(4):
        pixels = np.zeros((40, 48, 5), np.uint8)
        tifffile.imwrite(root / 'x.tif', pixels, photometric='minisblack', planarconfig='contig')
        (root / 'x.tif').replace(image_path(root, 'train', index))
    cfg = segmentation_config(root)
    cfg.model.data_preprocessor.update(mean=[100.0] * means, std=[50.0] * means)
    cfg.model.backbone.in_channels = channels
    settings = cfg.train_dataloader
    settings.dataset.pipeline[0].update(color_type='unchanged', imdecode_backend='tifffile')
    settings.dataset.pipeline[4:] = [dict(type='PackSegInputs')]
    loader = Runner.build_dataloader(settings)
    if message is None:
        check_samples(loader, cfg)
    else:
        with pytest.raises(DataError, match=message):
            check_samples(loader, cfg)


def binary(root, split, count):
    for index in range(count):
        write_label(root, split, index, np.eye(40, 48) * 255)


@pytest.mark.heavy
@pytest.mark.parametrize('split', ['train', 'val'])
def test_binary_masks_of_0_and_255_are_told_before_the_first_step(root, split):
    binary(root, split, 4 if split == 'train' else 3)
    settings = segmentation_config(root)[f'{split}_dataloader']
    with pytest.raises(DataError, match='hold nothing but 0 and 255, of which 255') as error:
        check_samples(Runner.build_dataloader(settings))
    assert f'images/{split}' in str(error.value)
    assert "set type='OwnSegDataset' and label_map={0: 0, 255: 1}" in str(error.value)
    settings.dataset.update(type='OwnSegDataset', label_map={0: 0, 255: 1})
    loader = Runner.build_dataloader(settings)
    check_samples(loader)
    sample = loader.dataset[0]['data_samples'].gt_sem_seg.data
    assert set(sample.unique().tolist()) <= {0, 1, 255}  # 255 of the padding


@pytest.mark.heavy
def test_a_rare_class_is_looked_for_before_masks_are_called_binary(tmp_path, monkeypatch):
    init_default_scope('mmseg')
    root = make_segmentation(tmp_path, train=9)
    binary(root, 'train', 9)
    write_label(root, 'train', 3, np.eye(40, 48) * 2)
    monkeypatch.setattr('polynext_mm.engine.checks.data.SAMPLES', 2)
    check_samples(Runner.build_dataloader(segmentation_config(root).train_dataloader))


@pytest.mark.heavy
def test_16_bits_are_told_before_the_first_step(root, caplog):
    for index in range(4):
        pixels = np.full((40, 48, 3), 4095, np.uint16)
        cv2.imwrite(str(root / 'deep.png'), pixels)
        (root / 'deep.png').replace(image_path(root, 'train', index))
    logger = MMLogger.get_instance('deep')
    logger.addHandler(caplog.handler)
    settings = segmentation_config(root).train_dataloader
    check_samples(Runner.build_dataloader(settings))
    assert '00.jpg (' in caplog.text and 'has 16 bits a sample, values up to 4095' in caplog.text
    caplog.clear()
    settings.dataset.pipeline[0].update(color_type='unchanged', to_float32=True)
    settings.dataset.pipeline[4:] = [dict(type='PackSegInputs')]
    loader = Runner.build_dataloader(settings)
    check_samples(loader)
    assert 'bits' not in caplog.text and loader.dataset[0]['inputs'].max() == 4095


@pytest.mark.parametrize('split', ['train', 'val'])
def test_labels_of_which_nothing_counts(root, split):
    for index in range(4 if split == 'train' else 3):
        write_label(root, split, index, constant(255))
    assert re.search(r'\d\d\.png .*every pixel is ignored, as in all \d labels', told(root, split))


def test_a_single_empty_label_passes(root):
    write_label(root, 'train', 1, constant(255))
    dataset = DATASETS.build(segmentation_config(root).train_dataloader.dataset)
    check_loading(dataset)
    for index in range(len(dataset)):
        dataset[index]


def test_another_ignored_id_of_the_data_set_passes(root):
    write_label(root, 'train', 1, np.r_[[[254] * 48], constant(0)[1:]])
    assert 'has the ids 254' in told(root)
    settings = segmentation_config(root).train_dataloader.dataset
    dataset = DATASETS.build(dict(settings, ignore_index=254))
    check_loading(dataset)
    dataset[1]


def test_a_contradiction_about_zero_names_the_setting(root):
    message = told(root, **{'train_dataloader.dataset.reduce_zero_label': True})
    assert 'reduce_zero_label' in message and '.png' in message


def test_ids_are_those_of_the_file_where_zero_is_reduced(root):
    step = dict(type='LoadAnnotations', reduce_zero_label=True)
    write_label(root, 'train', 0, constant(9))
    cfg = segmentation_config(root)
    cfg.train_dataloader.dataset.reduce_zero_label = True
    cfg.train_dataloader.dataset.pipeline[1] = step
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    check_loading(dataset)
    with pytest.raises(DataError, match='has the ids 9 .* the 4 classes have 1 to 4'):
        dataset[0]


def test_nothing_else_changes(root):
    """What comes out is what comes out without the checks, with the same random numbers."""
    settings = segmentation_config(root).train_dataloader.dataset
    plain = DATASETS.build(settings)
    loader = Runner.build_dataloader(
        dict(dataset=settings, sampler=dict(type='DefaultSampler', shuffle=False), batch_size=1)
    )
    checked = loader.dataset
    results = []
    for dataset in (plain, checked):
        np.random.seed(3)
        if dataset is checked:
            check_samples(loader)
        results.append(dataset[2]['inputs'])
    assert type(plain.pipeline) is Compose and isinstance(checked.pipeline, CheckedPipeline)
    assert (results[0] == results[1]).all()


@pytest.mark.heavy
def test_a_worker_tells_in_one_line(root):
    write_label(root, 'train', 3, constant(76))
    cfg = segmentation_config(root).train_dataloader
    cfg.update(num_workers=1, batch_size=2)
    loader = Runner.build_dataloader(cfg)
    check_loading(loader.dataset)
    with pytest.raises(DataError) as error:
        list(loader)
    assert '\n' not in str(error.value) and '03.png' in str(error.value)
    assert 'has the ids 76' in str(error.value)


@pytest.fixture
def detection(tmp_path):
    init_default_scope('mmdet')
    root = make_coco(tmp_path, ('box', 'ball', 'tent'))
    cfg = Config.fromfile(ROOT / 'configs' / 'mask_rcnn_cpolynext_t_coco_1x.py')
    settings = cfg.train_dataloader.dataset
    settings.update(data_root=f'{root}/', metainfo=dict(classes=('box', 'ball', 'tent')))
    return root, settings


def test_a_truncated_image_of_a_detection_set_is_named(detection):
    root, settings = detection
    cut_short(root / 'train2017' / '002.png')
    dataset = DATASETS.build(settings)
    check_loading(dataset)
    with pytest.raises(DataError, match=r'002\.png \(\d+ bytes, PNG, 128x128, mode RGB\) is cut'):
        for index in range(len(dataset)):
            dataset[index]


def test_boxes_of_unturned_pixels_are_told(detection):
    """As are sizes that belong to another image; both would train boxes beside their objects."""
    root, settings = detection
    path = root / 'train2017' / '001.png'
    tagged(path)
    for change, part in (
        (dict(width=48, height=40), 'listed as 48x40; EXIF turns it, and the boxes may be those'),
        (dict(width=96, height=80), 'listed as 96x80): check that width, height and boxes'),
        (dict(width=40, height=48), None),
    ):
        annotations = root / 'annotations' / 'instances_train2017.json'
        content = json.loads(annotations.read_text())
        content['images'][0].update(change)
        annotations.write_text(json.dumps(content))
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
        dataset = DATASETS.build(dict(settings, filter_cfg=None, pipeline=steps))
        check_loading(dataset)
        if part is None:
            dataset[0]
        else:
            with pytest.raises(DataError, match=r'001\.png \(40x48, ') as error:
                dataset[0]
            assert part in str(error.value)


def test_a_box_of_a_class_beyond_the_last_is_named(detection):
    _, settings = detection
    dataset = DATASETS.build(settings)
    check_loading(dataset)
    dataset.pipeline.num_classes = 0
    with pytest.raises(DataError, match=r'\.png .* has a box of class \d, and the 0 classes'):
        dataset[0]


def test_a_box_that_is_not_finite_is_named(detection):
    root, settings = detection
    path = root / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] = float('inf')
    path.write_text(json.dumps(content))
    dataset = DATASETS.build(settings)
    check_loading(dataset)
    with pytest.raises(DataError, match='no finite number'):
        for index in range(len(dataset)):
            dataset[index]
