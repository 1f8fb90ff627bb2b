"""benchmarks/resized_norms.py, at a size that takes no time."""

import pytest
import torch

from tests import golden
from tests.helpers.files import ROOT
from tests.helpers.programs import python, script
from tests.helpers.tiny import TINY_ARCH

tool = script('benchmarks/resized_norms')
make_materials = script('demo/make_materials')

PROGRAM = ROOT / 'benchmarks' / 'resized_norms.py'


def test_the_golden_input_is_that_of_the_tests():
    first, second, third = tool.golden_noise(64, 3)
    assert torch.equal(first, golden.image((64, 64)).double())
    assert torch.equal(torch.cat((first, second, third)), golden.image((64, 64), 3).double())


def test_a_network_has_the_statistics_of_its_images():
    images = torch.cat(tool.golden_noise(32, 4))
    model = tool.network(TINY_ARCH, images)
    with torch.no_grad():
        evaluated, trained = model(images), model.train()(images)
    torch.testing.assert_close(evaluated, trained)


def test_nothing_is_lost_at_the_size_of_the_statistics():
    seen, held_out = torch.cat(tool.golden_noise(32, 5)).split(4)
    at_32, at_48 = (tool.at_size(seen.split(1), side) for side in (32, 48))
    model = tool.network(TINY_ARCH, at_32)
    same = tool.compare(model, tool.network(TINY_ARCH, at_32), held_out)
    assert same['error of stages, %'] == '0, 0, 0, 0'
    assert same['cosine of logits'] == pytest.approx(1)
    other = tool.compare(model, tool.network(TINY_ARCH, at_48), tool.at_size([held_out], 48))
    errors = [float(error) for error in other['error of stages, %'].split(', ')]
    assert len(errors) == 4 and all(0 < error < 100 for error in errors)
    assert other['cosine of logits'] < 1


@pytest.mark.slow
def test_the_program_prints_its_table(tmp_path):
    make_materials.make_split(tmp_path, 'training', tool.STATISTICS_OF)
    photos = tmp_path / 'images' / 'training'
    sizes = ('--norm-size', 32, '--sizes', 48)
    printed = python(
        PROGRAM, '--archs', 'apolynext_t', *sizes, '--photos', photos, '--held-out', photos
    )
    header, _, *rows = printed.strip().splitlines()
    assert '48x48: error of stages, %' in header
    assert [row.split(' | ')[:2] for row in rows] == [
        ['| apolynext_t', 'photos'],
        ['| apolynext_t', 'golden input'],
    ]


def test_a_folder_without_enough_photos_is_named(tmp_path):
    with pytest.raises(SystemExit, match='has 0 photos .*and 4 are needed'):
        tool.photos(tmp_path, 4)
