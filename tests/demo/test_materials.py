"""The sample of the demos is what demo/materials/README.md says."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.files import ROOT, contents
from tests.helpers.programs import script
from tests.helpers.samples import few_scenes

make_materials = script('demo/make_materials')


def test_the_sample_stays_small():
    folder = ROOT / 'demo' / 'materials'
    kept = [folder / 'README.md', *folder.glob('licenses/*'), *folder.glob('photographs/*')]
    assert sum(path.stat().st_size for path in kept) < 1_000_000


@pytest.mark.parametrize('split', make_materials.SPLITS)
def test_labels_and_boxes_belong_to_the_scenes(split):
    folder = few_scenes()
    coco = json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())
    assert [category['name'] for category in coco['categories']] == list(make_materials.CLASSES)
    names = {image['id']: image['file_name'] for image in coco['images']}
    assert {path.name for path in (folder / 'images' / split).iterdir()} == set(names.values())
    labels = {}
    for image_id, name in names.items():
        with Image.open(folder / 'images' / split / name) as image:
            assert (image.size, image.mode) == ((128, 128), 'RGB'), name
        path = folder / 'annotations' / split / name
        labels[image_id] = np.asarray(Image.open(path.with_suffix('.png')))
        assert (labels[image_id].shape, labels[image_id].dtype) == ((128, 128), np.uint8)
    assert set(np.unique(np.stack(list(labels.values())))) == set(range(6))
    for box in coco['annotations']:
        left, top, width, height = box['bbox']
        inside = labels[box['image_id']][top : top + height, left : left + width]
        assert inside.shape == (height, width)
        # every row and column at the border of a box shows the piece
        piece = inside == box['category_id'] - 1
        assert piece.sum() >= box['area'] > 0 and box['id'] > 0
        assert piece[0].any() and piece[-1].any() and piece[:, 0].any() and piece[:, -1].any()


def test_no_row_of_a_photograph_is_in_two_splits():
    photograph = np.arange(101)[:, None].repeat(3, 1)
    rows = [
        set(make_materials.cut_band(photograph, start, end)[:, 0].tolist())
        for _, start, end in make_materials.SPLITS.values()
    ]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 101


def test_a_scene_shows_the_materials_that_its_labels_name():
    """Materials of one gray value each are told apart by it, whatever their dye."""
    bands = [np.full((90, 90), value, np.float32) for value in (-2.75, 2.75)]
    rng = np.random.default_rng(0)
    scene, ids, boxes = make_materials.compose(bands, rng)
    assert 0 < len(boxes) <= make_materials.PIECES[1]
    bright = scene.max(-1) > 100
    agreement = np.mean(bright == (ids == 1))
    assert agreement > 0.95  # shadows and edges are neither


@pytest.mark.heavy
def test_a_material_has_one_hue():
    band = np.random.default_rng(0).normal(size=(90, 200)).astype(np.float32)
    pixels = make_materials.lay_out(band, np.random.default_rng(0)).reshape(-1, 3)
    pixels = pixels[(pixels > 0).all(1)]
    shares = pixels / pixels.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, shares[:1].repeat(len(shares), 0), rtol=1e-9)


def test_scenes_are_made_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(make_materials, 'SPLITS', {'training': (3, 0.0, 0.5)})
    made = make_materials.make_scenes(tmp_path / 'a')
    assert [path.name for path in tmp_path.iterdir()] == ['a']
    assert len(contents(made)) == 2 * 3 + 1
    assert contents(made) == contents(make_materials.make_scenes(tmp_path / 'b'))
    (made / 'images' / 'training' / '000.jpg').unlink()
    assert len(contents(make_materials.make_scenes(made))) == 2 * 3  # it is left as it is
