"""Metafiles, model-index.yml and the tables of configs and models are what `make tables` writes."""

import runpy

import pytest
import yaml

from polynext_mm.commands.list_all import configs
from tests.helpers.files import ROOT

GENERATOR = runpy.run_path(str(ROOT / 'configs' / 'metafiles' / 'generate.py'))
WRITTEN = GENERATOR['costs_as_written']()
# Counted in the fast tests; the others in the slow one.
FEW = ('upernet_cpolynext_s_ade20k', 'retinanet_apolynext_t_coco_1x')


@pytest.mark.heavy
def test_every_file_is_what_its_generator_writes():
    for path, text in GENERATOR['contents'](WRITTEN).items():
        assert path.read_text(encoding='utf-8') == text, f'{path}: run `make tables`'


def test_every_config_is_listed_once():
    names = [row[0] for row in configs()[1:] if not row[0].startswith('_base_')]
    assert sorted(names) == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def test_metafiles_hold_published_figures_alone():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / path).read_text()) for path in index['Import']]
    results = {
        model['Name']: result['Metrics']
        for content in files
        for model in content['Models']
        for result in model.get('Results', [])
    }
    assert results == {
        'upernet_cpolynext_s_ade20k': {'mIoU': 50.6},
        'upernet_apolynext_s_ade20k': {'mIoU': 49.9},
        'upernet_convformer_s18_ade20k': {'mIoU': 48.6},
        'upernet_caformer_s18_ade20k': {'mIoU': 48.9},
    }


@pytest.mark.parametrize('name', FEW)
def test_what_a_few_configs_cost(name):
    assert GENERATOR['cost_of'](name) == WRITTEN[name]


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in WRITTEN if name not in FEW])
def test_what_the_other_configs_cost(name):
    assert GENERATOR['cost_of'](name) == WRITTEN[name]
