"""Masks as people have them, through `polynext-mm new segmentation` and `convert-dataset masks`."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image, ImageFilter

from polynext_mm.commands import main
from polynext_mm.folders import FolderError
from polynext_mm.folders.files import listed_splits
from tests.folders.test_folders import label, pairs_in, photo


@pytest.fixture
def roofs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs_in(tmp_path / 'roofs', 'images/{}.jpg', 'masks/{}.png', count=10)
    return tmp_path / 'roofs'


def new(*arguments: str, config: str = 'roofs.py') -> Config:
    assert main(['new', 'segmentation', 'roofs', *arguments]) == 0
    return Config.fromfile(config)


def ids_in_training(cfg: Config) -> set[int]:
    init_default_scope('mmseg')
    settings = dict(cfg.train_dataloader.dataset)
    settings['pipeline'] = [step for step in settings['pipeline'] if 'Crop' not in step['type']]
    dataset = DATASETS.build(settings)
    return {int(i) for one in dataset for i in one['data_samples'].gt_sem_seg.data.unique()}


def rewrite(roofs: Path, change) -> None:
    for path in (roofs / 'masks').iterdir():
        with Image.open(path) as image:
            changed = change(image.copy())
        changed.save(path)


@pytest.mark.parametrize(
    ('change', 'ids'),
    [
        (lambda image: image.point(lambda value: 255 * bool(value)).convert('1'), {0, 1}),
        (lambda image: image.convert('RGB'), {0, 1, 2}),
        (lambda image: image.convert('RGBA'), {0, 1, 2}),
        (lambda image: image.convert('LA'), {0, 1, 2}),
        (lambda image: image.point(lambda value: (0, 127, 255)[value % 3]), {0, 1, 2}),
        (lambda image: image.point(lambda value: (0, 1, 255)[value % 3]), {0, 1, 255}),
    ],
    ids=['1 bit', 'grey as RGB', 'RGBA', 'LA', '0, 127 and 255', '255 beside ids'],
)
def test_training_reads_the_classes(roofs, change, ids):
    rewrite(roofs, change)
    cfg = new()
    assert ids_in_training(cfg) == ids
    assert len(cfg.classes) == len(ids - {255})


def smoothed(image):
    spread = image.point(lambda value: 100 * value).rotate(7, Image.BICUBIC)
    return spread.filter(ImageFilter.GaussianBlur(0.7))


def test_smoothed_masks_are_refused(roofs):
    rewrite(roofs, smoothed)
    with pytest.raises(SystemExit, match='without anti-aliasing'):
        main(['new', 'segmentation', 'roofs'])
    with pytest.raises(SystemExit, match='without anti-aliasing'):
        main(['convert-dataset', 'masks', 'roofs/masks', 'ids'])
    assert not Path('roofs.py').exists() and not Path('ids').exists()


def test_a_named_class_may_be_absent(roofs):
    rewrite(roofs, lambda image: image.point(lambda value: min(value, 1)))
    (roofs / 'classes.txt').write_text('ground\nroof\ntree\n')
    cfg = new('--out', 'configs/roofs.py', config='configs/roofs.py')
    assert cfg.classes == ('ground', 'roof', 'tree') and ids_in_training(cfg) == {0, 1}


def test_converted_ids_stay(tmp_path):
    for index, values in enumerate([(0, 1), (0, 3), (1, 255)]):
        label(tmp_path / 'masks' / f'{index}.png', values)
    assert main(['convert-dataset', 'masks', str(tmp_path / 'masks'), str(tmp_path / 'ids')]) == 0
    found = [np.unique(Image.open(tmp_path / 'ids' / f'{index}.png')) for index in range(3)]
    assert [values.tolist() for values in found] == [[0, 1], [0, 3], [1, 255]]


def test_every_kind_of_image_is_asked_for(roofs):
    photo(roofs / 'images' / 'x.JPG', 99)
    label(roofs / 'masks' / 'x.png')
    with pytest.raises(SystemExit, match=r'images/\*\.JPG with masks'):
        main(['new', 'segmentation', 'roofs'])


def test_a_folder_without_training_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ('val', 'test'):
        pairs_in(tmp_path / 'roofs', f'images/{split}/{{}}.jpg', f'masks/{split}/{{}}.png')
    with pytest.raises(SystemExit, match='for test and val and none for train'):
        main(['new', 'segmentation', 'roofs'])


@pytest.mark.parametrize('other', ['val', 'test'])
@pytest.mark.parametrize('masks', ['masks/{}/{{}}.png', 'images/{}/{{}}_mask.png'])
def test_images_without_a_mask_are_left_out_of_every_split(masks, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ('train', other):
        pairs_in(tmp_path / 'roofs', f'images/{split}/{{}}.jpg', masks.format(split), count=6)
        photo(tmp_path / 'roofs' / 'images' / split / 'x.jpg', 99)
    cfg = new()
    init_default_scope('mmseg')
    sizes = dict(train=6, val=6) if other == 'val' else dict(train=5, val=1, test=6)
    built = {split: DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in sizes}
    assert {split: len(dataset) for split, dataset in built.items()} == sizes


def test_a_single_image_leaves_none_to_validate_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs_in(tmp_path / 'roofs', 'images/{}.jpg', 'masks/{}.png', count=1)
    with pytest.raises(SystemExit, match='a folder called val'):
        main(['new', 'segmentation', 'roofs'])


def test_files_of_an_earlier_config_stay(roofs):
    new()
    Path('roofs.py').unlink()
    before = Path('roofs_files/train.txt').read_text()
    with pytest.raises(SystemExit, match='roofs_files exists: use --out'):
        main(['new', 'segmentation', 'roofs', '--seed', '1'])
    assert Path('roofs_files/train.txt').read_text() == before


def test_lists_of_any_names(tmp_path):
    (tmp_path / 'train.txt').write_text('images/a b.c.jpg\n0 1\nnot_labelled 1\n')
    (tmp_path / 'val.txt').write_text('x.y\nC:\\data\\images\\z.png\n')
    stems = ['a b.c', '0', 'x.y', 'z', 'w']
    assert listed_splits(tmp_path, stems) == {'train': {'a b.c', '0'}, 'val': {'x.y', 'z'}}
    with pytest.raises(FolderError, match='several images of one name'):
        listed_splits(tmp_path, [*stems, 'w'])
