"""model-index.yml and the metafiles: every config once, with what it is and costs."""

from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

from helpers import ROOT
from polynext_mm.analysis import count_config
from polynext_mm.commands.list_all import configs
from polynext_mm.weights import PUBLISHED

INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
FILES = {path: yaml.safe_load((ROOT / path).read_text()) for path in INDEX['Import']}
MODELS = {model['Name']: model for content in FILES.values() for model in content['Models']}
TABLE = {row[0]: row for row in configs()[1:]}
TASKS = {'mmseg': 'Semantic Segmentation', 'mmdet': 'Object Detection'}
# Counted in the fast tests; the others in the slow one.
FEW = ('upernet_cpolynext_s_ade20k', 'retinanet_apolynext_t_coco_1x')


def is_of_a_sample(name: str) -> bool:
    return TABLE[name][3].startswith('demo/')


def test_every_config_but_those_of_the_samples_is_in_one_metafile():
    names = [model['Name'] for content in FILES.values() for model in content['Models']]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(name for name in TABLE if not is_of_a_sample(name))
    assert sorted(FILES) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / 'configs' / 'metafiles').glob('*.yml')
    )


@pytest.mark.parametrize('path', FILES)
def test_a_metafile_is_of_one_collection(path):
    (collection,) = FILES[path]['Collections']
    assert Path(path).stem == collection['Name'].lower().replace(' ', '_').replace('-', '_')
    assert (ROOT / collection['README']).is_file()
    assert collection['Paper']['URL'].startswith('https://arxiv.org/abs/')
    for model in FILES[path]['Models']:
        assert model['In Collection'] == collection['Name']
        assert model['Metadata']['Training Data'] in collection['Metadata']['Training Data']


@pytest.mark.parametrize('name', MODELS)
def test_a_model_is_what_its_config_is(name):
    model, row = MODELS[name], TABLE[name]
    assert model['Config'] == f'configs/{name}.py' and (ROOT / model['Config']).is_file()
    _, backbone, head, data, schedule, published, _ = row
    metadata = model['Metadata']
    assert metadata['Architecture'] == [backbone, head] and metadata['Training Data'] == data
    assert metadata['Schedule'] == schedule
    cfg = Config.fromfile(ROOT / model['Config'])
    arch, holds = cfg.model.backbone.arch, data.lower()
    released = [
        file
        for file in PUBLISHED.values()
        if (file.arch, file.holds, file.norm) == (arch, holds, cfg.model.backbone.get('norm', 'ln'))
    ]
    is_released = bool(released) and head == 'UperNet' and cfg.default_scope == 'mmseg'
    assert model.get('Weights') == (released[0].url if is_released else None)
    if published == 'none':
        assert 'Results' not in model
        return
    (result,) = model['Results']
    value, metric = published.split()
    assert result == dict(
        Task=TASKS[cfg.default_scope], Dataset=data, Metrics={metric: float(value)}
    )
    assert metadata['Results Reported By'] == 'the authors of PolyNeXt'
    if is_released:
        assert released[0].figure == float(value)


def assert_it_costs_what_it_says(name: str) -> None:
    metadata = MODELS[name]['Metadata']
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cost = count_config(cfg)
    assert metadata['Parameters'] == cost.parameters
    _, height, width = cost.shape
    assert metadata['FLOPs'] == f'{cost.macs / 1e9:.1f} G multiply-adds at {height}x{width}'


@pytest.mark.parametrize('name', FEW)
def test_what_a_few_models_cost(name):
    assert_it_costs_what_it_says(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [name for name in MODELS if name not in FEW and 'FLOPs' in MODELS[name]['Metadata']]
)
def test_what_the_other_models_cost(name):
    assert_it_costs_what_it_says(name)
