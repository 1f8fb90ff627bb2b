"""tools/check_dataset.py: the table, the findings, the pictures and the exit code."""

import json
import os
import re
import shutil

import cv2
import numpy as np
import pytest
import tifffile
from mmengine.config import Config
from PIL import Image

from polynext_mm.commands.check_dataset import main
from polynext_mm.datasets import survey
from polynext_mm.engine.checks.survey import examine
from tests.coco_sample import make_coco
from tests.helpers.files import ROOT
from tests.segmentation_sample import (
    CLASSES,
    constant,
    cut_short,
    end_missing,
    image_path,
    label_path,
    make_segmentation,
    segmentation_config,
    write_label,
)

SHAPES = ('box', 'ball', 'tent')


@pytest.fixture
def root(tmp_path):
    return make_segmentation(tmp_path / 'data', train=6)


@pytest.fixture
def check(tmp_path, capsys):
    """Run the tool in this process on a config; return its exit code and what it printed."""

    def run(cfg: Config, *arguments):
        path = tmp_path / 'config.py'
        cfg.dump(path)
        pictures = ['--pictures', str(tmp_path / 'pictures')]
        try:
            code = main([str(path), *pictures, *arguments])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return (1, code) if isinstance(code, str) else (code, printed.out)

    return run


def rows(printed: str) -> dict[str, list[str]]:
    """Of the first table, by class."""
    return {line.split()[1]: line.split() for line in printed.splitlines() if '%' in line}


def test_a_sound_set_is_counted(root, check):
    ids = np.repeat([0, 0, 1, 2, 3, 255], 8)[None].repeat(40, 0)
    for index in range(6):
        write_label(root, 'train', index, ids)
    code, printed = check(segmentation_config(root))
    assert code == 0 and '0 errors, 0 notes' in printed
    table = printed[: printed.index('val_dataloader.dataset (')]
    assert re.search(r'images +6 read, 0 broken', table)
    assert re.search(r'widths +48 to 48, median 48', table)
    assert re.search(r'modes +RGB 6', table) and re.search(r'label modes +L 6', table)
    assert re.search(r'ignored +16.67% of all pixels', table)
    assert rows(table)['ground'] == ['0', 'ground', '33.333%', '6']
    assert rows(table)['tree'] == ['3', 'tree', '16.667%', '6']


def test_pictures_show_labels_in_their_colours(root, check, tmp_path):
    palette = [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0]]
    write_label(root, 'train', 0, constant(1))
    save = Image.new('RGB', (48, 40))
    save.save(image_path(root, 'train', 0))
    cfg = segmentation_config(root)
    for split in ('train', 'val', 'test'):
        metainfo = dict(classes=CLASSES, palette=palette)
        cfg[f'{split}_dataloader'].dataset.metainfo = metainfo
    check(cfg, '--samples', '2')
    written = sorted(path.name for path in (tmp_path / 'pictures').iterdir())
    assert written == ['train_0_00.png', 'train_5_05.png', 'val_0_00.png', 'val_2_02.png']
    picture = np.asarray(Image.open(tmp_path / 'pictures' / 'train_0_00.png')).astype(int)
    middle = picture[picture.shape[0] // 2, picture.shape[1] * 3 // 4]
    assert middle[1] > 90 and middle[0] < 20 and middle[2] < 20


def rgb_label(root):
    Image.new('RGB', (48, 40)).save(label_path(root, 'val', 1))


def other_size(root):
    Image.new('L', (24, 20)).save(label_path(root, 'val', 1))


def nothing_but_ignored(root):
    for index in range(3):
        write_label(root, 'val', index, constant(255))


def shared_image(root):
    shutil.copy(image_path(root, 'train', 3), image_path(root, 'val', 0))


@pytest.mark.parametrize(
    ('mistake', 'told', 'remedy'),
    [
        (
            lambda root: cut_short(image_path(root, 'val', 1)),
            r'01\.jpg \(\d+ bytes, JPEG, 48x40, mode RGB\) is cut short',
            'get the file again',
        ),
        (
            lambda root: cut_short(label_path(root, 'val', 1)),
            r'01\.png \(\d+ bytes, PNG, 48x40, mode L\) is cut short',
            'get the file again',
        ),
        (
            lambda root: label_path(root, 'val', 1).unlink(),
            r'1 of 3 images have no label \(.*01\.png\)',
            'seg_map_suffix',
        ),
        (
            lambda root: write_label(root, 'val', 1, constant(76)),
            r'ids that are no class: 76; the 4 classes have 0 to 3 \(76 in .*01\.png\)',
            'write 255 where',
        ),
        (
            lambda root: write_label(root, 'val', 1, constant(4)),
            'ids that are no class: 4;',
            'reduce_zero_label=True',
        ),
        (rgb_label, r'1 labels have colours in place of ids \(.*01\.png\)', 'one channel'),
        (
            other_size,
            r'another size than .*01\.png \(24x20, its image 48x40\)',
            'nearest neighbour',
        ),
        (nothing_but_ignored, 'every pixel is ignored', 'reduce_zero_label'),
        (
            shared_image,
            r'1 images of val_dataloader.dataset are in train_dataloader.dataset as well '
            r'\(e\.g\. .*val/00\.jpg is .*train/03\.jpg\)',
            'take them out',
        ),
    ],
    ids=[
        'image',
        'label',
        'pair',
        'id',
        'ids from 1',
        'colours',
        'size',
        'ignored',
        'train and validation',
    ],
)
def test_what_is_wrong_ends_in_1_and_a_hint(root, check, mistake, told, remedy):
    mistake(root)
    code, printed = check(segmentation_config(root), '--fix-hints')
    assert code == 1
    lines = printed.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith('ERROR')]
    assert len(errors) == 1 and re.search(told, lines[errors[0]]), printed
    assert lines[errors[0] + 1].startswith('       -> ') and remedy in lines[errors[0] + 1]


@pytest.mark.parametrize('count', [1, 8, 20])
def test_an_image_that_opencv_alone_cannot_read_is_an_error(root, check, count):
    end_missing(image_path(root, 'val', 1), count)
    cfg = segmentation_config(root)
    code, printed = check(cfg, '--fix-hints')
    assert code == 1 and '1 errors' in printed
    assert re.search(r'01\.jpg \(\d+ bytes, PNG, 48x40, mode RGB\) is cut short or dam', printed)
    assert '(OpenCV cannot decode it, though Pillow can)' in printed and 'write it anew' in printed
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pipeline[0].imdecode_backend = 'pillow'
    assert check(cfg)[0] == 0


def test_hints_are_given_when_asked_for(root, check):
    write_label(root, 'val', 1, constant(76))
    _, printed = check(segmentation_config(root))
    assert '->' not in printed and '1 errors' in printed and '--fix-hints says' in printed


def test_reduce_zero_label_where_zero_is_a_class(root, check):
    cfg = segmentation_config(root)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.reduce_zero_label = True
    code, printed = check(cfg, '--fix-hints')
    assert code == 0 and 'ids seem to be classes from 0 on' in printed
    assert 'set reduce_zero_label=False' in printed


def test_classes_are_compared_with_heads(root, check):
    code, printed = check(segmentation_config(root, **{'model.decode_head.num_classes': 150}))
    assert code == 1 and 'ERROR  model.decode_head.num_classes=150, but' in printed


def test_a_missing_data_set_is_one_message(tmp_path, check):
    code, message = check(segmentation_config(tmp_path / 'nowhere'))
    assert code == 1 and message.startswith('DatasetNotFoundError: there is no ')


def test_the_data_can_be_moved(root, check):
    cfg = segmentation_config(root)
    cfg.merge_from_dict(
        {
            'data_root': 'nowhere',
            **{
                f'{task}_dataloader.dataset.data_root': 'nowhere'
                for task in ('train', 'val', 'test')
            },
        }
    )
    assert 'there is no ' in check(cfg)[1]
    code, printed = check(cfg, '--cfg-options', f'data_root={root}')
    assert code == 0 and '0 errors' in printed


def test_a_broken_image_takes_no_other_from_the_pictures(root, check, tmp_path):
    for index in range(6):
        path = image_path(root, 'train', index)
        path.rename(path.with_name(f'one ({index}){path.suffix}'))
        label = label_path(root, 'train', index)
        label.rename(label.with_name(f'one ({index}){label.suffix}'))
    broken = next(image_path(root, 'train', 0).parent.glob('one (0).*'))
    broken.write_bytes(broken.read_bytes()[:100])
    assert check(segmentation_config(root), '--samples', '6')[0] == 1
    drawn = [path.stem for path in (tmp_path / 'pictures').glob('train*')]
    assert sorted(name[-7:] for name in drawn) == [f'one ({index})' for index in range(1, 6)]


def test_threads_find_what_one_thread_finds(root):
    pairs = [
        (str(image_path(root, 'train', i)), str(label_path(root, 'train', i))) for i in range(6)
    ] * 12
    steps = []
    alone, shared = survey(pairs), survey(pairs, workers=2, progress=steps.append)
    assert alone == shared and sum(steps) == shared.samples == 72 and len(steps) > 1


def test_ids_of_sixteen_bits_are_counted_whole(root):
    path = write_label(root, 'train', 0, constant(1000))
    facts = examine(str(image_path(root, 'train', 0)), str(path))
    assert facts.ids == {1000: 48 * 40} and facts.label_mode == 'I;16'


def binary_masks(root):
    for split, count in (('train', 6), ('val', 3)):
        for index in range(count):
            write_label(root, split, index, np.eye(40, 48) * 255)


def test_binary_masks_are_an_error_whose_remedy_works(root, check):
    binary_masks(root)
    cfg = segmentation_config(root)
    code, printed = check(cfg, '--fix-hints')
    assert code == 1 and printed.count('labels hold nothing but 0 and 255, of which 255') == 2
    assert "set type='OwnSegDataset' and label_map={0: 0, 255: 1}" in printed
    for task in ('train', 'val', 'test'):
        cfg[f'{task}_dataloader'].dataset.update(type='OwnSegDataset', label_map={0: 0, 255: 1})
    cfg.custom_imports.imports.append('polynext_mm.datasets.own')
    code, printed = check(cfg)
    assert code == 0 and '0 errors' in printed  # from a file that the config was written to
    assert printed.count('ignored         0.00%') == 2
    assert rows(printed)['road'][0] == '255' and rows(printed)['ground'][0] == '0'


def test_labels_of_one_bit_are_counted_and_drawn(root, check):
    Image.fromarray(np.eye(40, 48, dtype=bool)).save(label_path(root, 'val', 0))
    code, printed = check(segmentation_config(root))
    assert code == 0 and 'L 2, 1 1' in printed


def test_floats_that_are_no_ids_are_an_error(root, check):
    path = label_path(root, 'val', 0)
    Image.fromarray(np.full((40, 48), np.nan, np.float32)).save(path, 'TIFF')
    code, printed = check(segmentation_config(root))
    assert code == 1 and '1 errors' in printed and 'has pixels that are no number' in printed


def turned(path, orientation, size=(48, 40)):
    """Write a picture with a red left half, turned or mirrored by EXIF."""
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.new('RGB', size)
    picture.paste((250, 0, 0), (0, 0, size[0] // 2, size[1]))
    picture.save(path, 'JPEG', exif=exif)


def test_labels_and_pictures_are_those_of_turned_images(root, check, tmp_path):
    """As training sees them, and as viewers show them."""
    turned(image_path(root, 'train', 0), 6)
    write = Image.fromarray(np.where(np.arange(48)[:, None] < 24, 1, 0).repeat(40, 1).astype('u1'))
    write.save(label_path(root, 'train', 0))
    code, printed = check(segmentation_config(root), '--samples', '1')
    assert code == 0 and '0 errors, 0 notes' in printed
    picture = np.asarray(Image.open(tmp_path / 'pictures' / 'train_0_00.png'))
    assert picture.shape[:2] == (48, 80)
    assert picture[10, 20, 0] > 200 > 50 > picture[40, 20, 0]  # its upper half is red


def test_a_half_turn_is_a_note(root, check):
    turned(image_path(root, 'train', 0), 3)
    code, printed = check(segmentation_config(root))
    assert code == 0 and '0 errors, 1 notes' in printed
    assert re.search(r'1 images are turned or mirrored by EXIF .*00\.jpg', printed)


def test_images_of_16_bits_are_a_note(root, check):
    cv2.imwrite(str(root / 'deep.png'), np.full((40, 48, 3), 4095, np.uint16))
    (root / 'deep.png').replace(image_path(root, 'train', 0))
    code, printed = check(segmentation_config(root))
    assert code == 0 and '1 images of more than 8 bits a sample: ' in printed
    assert '00.jpg (' in printed and 'values up to 4095' in printed


def test_images_of_five_channels_are_read_as_the_pipeline_reads_them(root, check, tmp_path):
    path = image_path(root, 'train', 0)
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 48, 5), np.uint16)
    tifffile.imwrite(root / 'deep.tif', pixels, photometric='minisblack', planarconfig='contig')
    cfg = segmentation_config(root)
    for index in range(6):
        shutil.copy(root / 'deep.tif', image_path(root, 'train', index))
    assert check(cfg)[0] == 1
    load = cfg.train_dataloader.dataset.pipeline[0]
    load.update(color_type='unchanged', imdecode_backend='tifffile', to_float32=True)
    code, printed = check(cfg)
    assert code == 0 and '6 read, 0 broken' in printed and '5 x uint16 6' in printed
    assert Image.open(tmp_path / 'pictures' / f'train_0_{path.stem}.png').size == (96, 40)


def test_a_palette_of_another_length_is_one_message(root, check):
    cfg = segmentation_config(root)
    cfg.train_dataloader.dataset.metainfo.palette = [[0, 0, 0]]
    code, message = check(cfg)
    assert code == 1 and 'train_dataloader.dataset.metainfo.palette has 1 colours' in message


def test_images_of_a_single_pixel_are_read(root, check):
    Image.new('RGB', (1, 1)).save(image_path(root, 'train', 0))
    code, printed = check(segmentation_config(root))
    assert code == 1 and '6 read, 0 broken' in printed and 'its image 1x1' in printed


def test_small_images_of_a_validation_are_an_error(root, check):
    Image.new('RGB', (48, 20)).save(image_path(root, 'val', 0))
    write_label(root, 'val', 0, np.zeros((20, 48)))
    cfg = segmentation_config(root)
    del cfg.val_dataloader.dataset.pipeline[1]  # which resizes
    code, printed = check(cfg)
    assert code == 1 and 'reach the network with less than 32 pixels' in printed
    assert '1 errors' in printed


def test_an_id_that_label_map_does_not_name(root, check):
    cfg = segmentation_config(root)
    cfg.custom_imports.imports.append('polynext_mm.datasets.own')
    settings = cfg.train_dataloader.dataset
    settings.update(type='OwnSegDataset', label_map={0: 0, 1: 1, 255: 1})
    code, printed = check(cfg, '--fix-hints')
    assert code == 1 and 'ids that are no class: 2, 3; the 4 classes have 0, 1, 255 (' in printed
    assert '-> add them to label_map, with 255 where they are no class' in printed


def test_many_files_of_one_fault_are_not_all_listed(tmp_path, check):
    root = make_segmentation(tmp_path / 'many', train=30)
    for index in range(30):
        label = label_path(root, 'train', index)
        Image.open(label).convert('L').save(label, 'JPEG')
    code, printed = check(segmentation_config(root))
    assert code == 1 and printed.count('is a label in JPEG') == 20
    assert '10 more files like the last of them' in printed


def test_pictures_are_not_written_over_images(root, check):
    label = label_path(root, 'train', 0)
    before = label.read_bytes()
    os.link(label, root / 'train_0_00.png')
    code, message = check(segmentation_config(root), '--pictures', str(root))
    assert code == 1 and 'train_0_00.png is an input and would be overwritten' in message
    assert label.read_bytes() == before


def test_large_images_are_read(root, check, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert check(segmentation_config(root))[0] == 0


@pytest.fixture
def detection(tmp_path):
    root = make_coco(tmp_path / 'coco', SHAPES, train=6)
    cfg = Config.fromfile(ROOT / 'configs' / 'retinanet_cpolynext_t_coco_1x.py')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.update(
            data_root=f'{root}/', metainfo=dict(classes=SHAPES)
        )
    cfg.model.bbox_head.num_classes = len(SHAPES)
    return root, cfg


def test_boxes_are_counted_and_drawn(detection, check, tmp_path):
    root, cfg = detection
    code, printed = check(cfg, '--samples', '1')
    assert code == 0, printed
    assert re.search(r'boxes +(\d+), of which \1 usable', printed)
    assert all(re.search(rf'{name} +\d+ +\d+', printed) for name in SHAPES)
    picture = np.asarray(Image.open(tmp_path / 'pictures' / 'train_0_001.png')).astype(int)
    plain, drawn = np.split(picture, 2, axis=1)
    assert (np.abs(plain - drawn).sum(2) > 60).any()


def test_mistakes_of_a_detection_set(detection, check):
    root, cfg = detection
    path = root / 'annotations' / 'instances_val2017.json'
    path.write_text(path.read_text().replace('"width": 128', '"width": 256'))
    cut_short(root / 'train2017' / '004.png')
    shutil.copy(root / 'train2017' / '001.png', root / 'val2017' / '002.png')
    code, printed = check(cfg)
    assert code == 1 and '3 errors' in printed
    assert re.search(r'004\.png \(\d+ bytes, PNG, 128x128, mode RGB\) is cut short', printed)
    assert re.search(r'001\.png \(128x128, listed as 256x128\)', printed)
    assert '1 images of val_dataloader.dataset are in train_dataloader.dataset' in printed


def test_boxes_of_unturned_images_are_an_error(detection, check):
    root, cfg = detection
    path = root / 'train2017' / '001.png'
    turned(path, 6, (128, 96))
    annotations = root / 'annotations' / 'instances_train2017.json'
    content = json.loads(annotations.read_text())
    content['images'][0].update(width=128, height=96)
    annotations.write_text(json.dumps(content))
    code, printed = check(cfg, '--fix-hints')
    assert code == 1 and '1 errors' in printed
    assert '001.png (96x128, listed as 128x96; EXIF turns it, and the boxes may be' in printed
    assert "set color_type='color_ignore_orientation' in every LoadImageFromFile" in printed
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
    assert check(cfg)[0] == 0
