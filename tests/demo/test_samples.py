"""The samples in demo/ are what their READMEs say, and the scripts that make them are right."""

import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

import make_landcover
import make_treecrowns
from helpers import ROOT, contents
from package_files import find_file, package_files

LANDCOVER = ROOT / 'demo' / 'landcover'
TREECROWNS = ROOT / 'demo' / 'treecrowns'
LANDCOVER_TILES = {'training': 916, 'validation': 277}
TREECROWN_TILES = {'train': 36, 'val': 11}
TREECROWN_BOXES = {'train': 605, 'val': 393}


def stems(folder, suffix):
    """Return the names, without suffix, of all files in a folder, which must be of one kind."""
    files = list(folder.iterdir())
    assert {file.suffix for file in files} == {suffix}
    return {file.stem for file in files}


@pytest.mark.parametrize('folder', [LANDCOVER, TREECROWNS], ids=lambda folder: folder.name)
def test_samples_stay_small(folder):
    total = sum(map(len, contents(folder).values()))
    assert 1_000_000 < total <= 4_000_000
    assert (folder / 'README.md').is_file()


# Land cover as committed


@pytest.fixture(scope='module')
def annotations():
    """Ids of every land cover tile, (64, 64) by (split, name)."""
    return {
        (split, path.stem): np.asarray(Image.open(path))
        for split in LANDCOVER_TILES
        for path in (LANDCOVER / 'annotations' / split).iterdir()
    }


@pytest.mark.parametrize('split', LANDCOVER_TILES)
def test_every_landcover_image_has_its_annotation(split):
    images = stems(LANDCOVER / 'images' / split, '.jpg')
    assert images == stems(LANDCOVER / 'annotations' / split, '.png')
    assert len(images) == LANDCOVER_TILES[split]


@pytest.mark.parametrize('split', LANDCOVER_TILES)
def test_landcover_images_are_tiles(split):
    for path in (LANDCOVER / 'images' / split).iterdir():
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((64, 64), 'RGB'), path


def test_landcover_annotations_hold_ids(annotations):
    seen = set()
    for key, ids in annotations.items():
        assert (ids.shape, ids.dtype) == ((64, 64), np.uint8), key
        seen.update(np.unique(ids).tolist())
    assert seen == set(range(7))


def test_landcover_tiles_show_labelled_land(annotations):
    for key, ids in annotations.items():
        assert np.mean(ids == 1) <= 0.6, key
        assert np.mean(ids == 0) <= 0.3, key


def test_landcover_is_split_by_longitude():
    """The left edge of a tile decides its block of 450 pixels; one block in four validates."""
    for split in LANDCOVER_TILES:
        for name in stems(LANDCOVER / 'images' / split, '.jpg'):
            row, col = map(int, re.fullmatch(r'r(\d\d)_c(\d\d)', name).groups())
            assert row < 42 and col < 84, name
            assert (64 * col // 450 % 4 == 1) == (split == 'validation'), name


def test_mmseg_reads_landcover():
    datasets = pytest.importorskip('mmseg.datasets')
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets.transforms import LoadAnnotations

    dataset = datasets.BaseSegDataset(
        data_root=str(LANDCOVER),
        data_prefix={'img_path': 'images/validation', 'seg_map_path': 'annotations/validation'},
        img_suffix='.jpg',
        seg_map_suffix='.png',
        reduce_zero_label=True,
        metainfo={'classes': list(make_landcover.CLASSES)},
        pipeline=[LoadImageFromFile(), LoadAnnotations()],
    )
    assert len(dataset) == LANDCOVER_TILES['validation']

    name = 'r12_c65'  # has ignored pixels
    index = next(i for i in range(len(dataset)) if name in dataset.get_data_info(i)['img_path'])
    sample = dataset[index]
    assert sample['img'].shape == (64, 64, 3)
    ids = np.asarray(Image.open(LANDCOVER / 'annotations' / 'validation' / f'{name}.png'))
    assert (ids == 0).any()
    np.testing.assert_array_equal(sample['gt_seg_map'], np.where(ids == 0, 255, ids - 1.0))


# Making land cover tiles


@pytest.fixture
def globe():
    """A small globe of noise, 900 x 1800 pixels: imagery and class ids."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (900, 1800, 3), dtype=np.uint8)
    return picture, rng.integers(1, 7, (900, 1800), dtype=np.uint8)


def test_igbp_classes_are_merged():
    merged = make_landcover.merge_classes(np.arange(17, dtype=np.uint8))
    assert merged.tolist() == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 4, 0, 4, 5, 6]
    assert merged.dtype == np.uint8


def test_labels_are_resampled_at_pixel_centres():
    """Three pixels of the picture span four labels, as in the real maps."""
    labels = np.arange(32).reshape(4, 8)
    resampled = make_landcover.resample_nearest(labels, 3, 6)
    assert resampled.tolist() == [
        [row * 8 + col for col in (0, 2, 3, 4, 6, 7)] for row in (0, 2, 3)
    ]


def test_no_pixel_is_in_two_tiles():
    tiles = make_landcover.tile_grid(2700, 5400)
    assert len(tiles) == 42 * 84
    covered = np.zeros((2700, 5400), dtype=np.uint8)
    for tile in tiles:
        assert (tile.left // 450 % 4 == 1) == (tile.split == 'validation')
        covered[tile.top : tile.top + 64, tile.left : tile.left + 64] += 1
    assert covered.max() == 1 and covered.sum() == 42 * 84 * 64 * 64


@pytest.mark.parametrize('value, limit', [(1, 0.6), (0, 0.3)], ids=['water', 'ignored'])
def test_tiles_without_much_land_are_dropped(value, limit):
    ids = np.full(1000, 3, dtype=np.uint8)
    ids[: round(1000 * limit)] = value
    assert make_landcover.is_useful(ids)
    ids[round(1000 * limit)] = value
    assert not make_landcover.is_useful(ids)


def test_tiles_are_cut_where_their_names_say(globe):
    picture, ids = globe
    ids[64:128, 192:256] = 1  # all water: row 1, first column of the second block
    cut = {
        tile.name: (pixels, labels, tile.split)
        for tile, pixels, labels in make_landcover.cut_tiles(picture, ids)
    }
    assert len(cut) == 14 * 28 - 1 and 'r01_c03' not in cut
    pixels, labels, split = cut['r02_c03']
    assert split == 'validation'
    np.testing.assert_array_equal(pixels, picture[128:192, 192:256])
    np.testing.assert_array_equal(labels, ids[128:192, 192:256])


def test_landcover_files_are_reproducible(globe, tmp_path):
    """The second folder has a tile of an earlier run, which must be deleted."""
    stale = tmp_path / 'b' / 'images' / 'training' / 'r99_c99.jpg'
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b'')
    for name in 'ab':
        counts = make_landcover.write_tiles(make_landcover.cut_tiles(*globe), tmp_path / name)
    made = contents(tmp_path / 'a')
    assert made == contents(tmp_path / 'b')
    assert len(made) == 2 * 14 * 28
    assert sum(pixels.sum() for pixels in counts.values()) == 14 * 28 * 64 * 64


def test_maps_of_less_than_the_globe_are_refused(tmp_path):
    Image.new('RGB', (20, 20)).save(tmp_path / 'bmng.jpg')
    with pytest.raises(SystemExit, match='not a map of the whole globe'):
        make_landcover.load_globe(tmp_path)


# Tree crowns as committed


@pytest.fixture(params=TREECROWN_TILES)
def crowns(request):
    """The name of a split, and its annotations as pycocotools reads them."""
    coco = pytest.importorskip('pycocotools.coco')
    split = request.param
    return split, coco.COCO(str(TREECROWNS / 'annotations' / f'instances_{split}.json'))


def test_coco_lists_every_tile(crowns):
    split, coco = crowns
    images = coco.loadImgs(coco.getImgIds())
    assert {image['file_name'] for image in images} == {
        f'{name}.jpg' for name in stems(TREECROWNS / split, '.jpg')
    }
    assert len(images) == TREECROWN_TILES[split]
    for image in images:
        with Image.open(TREECROWNS / split / image['file_name']) as tile:
            assert tile.size == (image['width'], image['height'])


def test_coco_boxes_lie_in_their_tiles(crowns):
    split, coco = crowns
    boxes = coco.loadAnns(coco.getAnnIds())
    assert len(boxes) == TREECROWN_BOXES[split]
    assert all(box['id'] > 0 for box in boxes)
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == ['tree']
    for box in boxes:
        left, top, width, height = box['bbox']
        image = coco.imgs[box['image_id']]
        assert left >= 0 and top >= 0 and width > 0 and height > 0
        assert left + width <= image['width'] and top + height <= image['height']
        assert (box['area'], box['iscrowd'], box['category_id']) == (width * height, 0, 1)


def test_coco_takes_perfect_detections(crowns):
    """A detector that finds every box scores 1, so the evaluation works with our ids."""
    from pycocotools.cocoeval import COCOeval

    _, coco = crowns
    found = [
        {'image_id': box['image_id'], 'category_id': 1, 'bbox': box['bbox'], 'score': 1.0}
        for box in coco.dataset['annotations']
    ]
    evaluation = COCOeval(coco, coco.loadRes(found), 'bbox')
    evaluation.params.maxDets = [1, 10, 200]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval['precision'][..., 0, -1]
    assert precision.min() == pytest.approx(1)


def test_crowns_are_split_by_photograph():
    photos = {
        split: {
            re.fullmatch(r'(.+)_r\d_c\d', name)[1] for name in stems(TREECROWNS / split, '.jpg')
        }
        for split in TREECROWN_TILES
    }
    assert photos == {split: set(names) for split, names in make_treecrowns.PHOTOS.items()}
    assert not photos['train'] & photos['val']


# Making tree crown tiles


def test_voc_boxes_count_from_zero(tmp_path):
    """A box around all of a picture of 30 x 20 pixels, as VOC writes it."""
    voc = tmp_path / 'photo.xml'
    voc.write_text(
        '<annotation><object><name>Tree</name><bndbox><ymin>1</ymin><xmin>1</xmin>'
        '<xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>'
    )
    assert make_treecrowns.read_boxes(voc).tolist() == [[0, 0, 30, 20]]
    voc.write_text('<annotation/>')
    assert make_treecrowns.read_boxes(voc).shape == (0, 4)


@pytest.mark.parametrize(
    'length, edges',
    [(100, [0, 100]), (400, [0, 400]), (701, [0, 350, 701]), (1249, [0, 416, 832, 1249])],
)
def test_photographs_are_cut_evenly(length, edges):
    assert make_treecrowns.cut_evenly(length) == edges


def test_boxes_are_clipped_to_the_tile():
    boxes = np.array(
        [
            [110, 210, 120, 230],  # inside
            [90, 210, 120, 230],  # two thirds inside
            [70, 210, 109, 230],  # less than a third inside
            [70, 210, 115, 230],  # a third inside
            [10, 10, 20, 20],  # outside
        ]
    )
    clipped = make_treecrowns.clip_boxes(boxes, (100, 200, 500, 600))
    assert clipped.tolist() == [[10, 10, 20, 30], [0, 10, 20, 30], [0, 10, 15, 30]]


def test_crown_files_are_reproducible(tmp_path):
    """The second folder has a tile of an earlier run, which must be deleted."""
    noise = np.random.default_rng(0).integers(0, 256, (430, 810, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, 30, 20], [700, 400, 750, 430]])
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'gone_r0_c0.jpg').write_bytes(b'')
    cocos = [
        make_treecrowns.make_split({'p': (Image.fromarray(noise), boxes)}, tmp_path / name)
        for name in 'ab'
    ]
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert json.dumps(cocos[0]) == json.dumps(cocos[1])
    assert [image['file_name'] for image in cocos[0]['images']] == ['p_r0_c0.jpg', 'p_r0_c1.jpg']
    assert [(box['image_id'], box['bbox']) for box in cocos[0]['annotations']] == [
        (1, [0, 0, 30, 20]),
        (2, [295, 400, 50, 30]),
    ]


def test_boxes_outside_the_photograph_are_refused(tmp_path):
    Image.new('RGB', (20, 20)).save(tmp_path / 'p.png')
    (tmp_path / 'p.xml').write_text(
        '<a><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>21</xmax><ymax>20</ymax></bndbox></a>'
    )
    with pytest.raises(SystemExit, match='outside its photograph'):
        make_treecrowns.load_photo(tmp_path, 'p')


# Sources


def test_wheels_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / 'thing-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('thing/data/picture.txt', 'hello')
    with package_files(['thing==1.0'], tmp_path) as folder:
        assert find_file(folder, 'picture.txt', 'thing==1.0').read_text() == 'hello'
    assert not folder.exists()


def test_missing_sources_are_named(tmp_path):
    with (
        pytest.raises(SystemExit, match='is not a folder'),
        package_files(['thing==1.0'], tmp_path / 'nowhere'),
    ):
        pass
    with pytest.raises(SystemExit, match='one file picture.txt, from thing==1.0, and has none'):
        find_file(tmp_path, 'picture.txt', 'thing==1.0')
