"""The table of published files agrees with the networks and with the configs."""

import pytest
from mmengine.config import Config

from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED
from tests.helpers.files import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('upernet_?polynext_*_ade20k.py'))
IMAGENET = [name for name, file in PUBLISHED.items() if file.holds == 'imagenet']


def test_every_arch_has_its_files():
    imagenet = {PUBLISHED[name].arch for name in IMAGENET}
    assert imagenet | {'cpolynext_lr'} == set(ARCHS)
    low = {file.holds for file in PUBLISHED.values() if file.arch == 'cpolynext_lr'}
    assert low == {'cifar10', 'svhn', 'tiny_imagenet'}


def test_entries_are_consistent():
    assert len({file.url for file in PUBLISHED.values()}) == len(PUBLISHED) == 16
    folder = PUBLISHED['cpolynext_t'].url.rpartition('/')[0]
    assert folder.startswith('https://')
    for name, file in PUBLISHED.items():
        assert file.arch in ARCHS
        assert file.file.rpartition('.')[0] == name
        assert file.url == f'{folder}/{file.file}'
        ending = '_bn' if file.norm == 'bn' else ''
        expected = {
            'imagenet': file.arch + ending,
            'ade20k': 'uper_' + file.arch.replace('_', ''),
        }
        assert name == expected.get(file.holds, f'{file.arch}_{file.holds}')


def test_the_address_of_the_release_stands_in_one_file():
    host = PUBLISHED['cpolynext_t'].url.split('/')[2]
    folders = ('benchmarks', 'configs', 'demo', 'docs', 'polynext_mm', 'tests', 'tools')
    files = [path for folder in folders for path in (ROOT / folder).rglob('*.*')]
    texts = [path for path in files if path.suffix in ('.md', '.py', '.sh')]
    assert ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py' in texts
    found = [path.name for path in texts if host in path.read_text()]
    assert found == ['published.py']


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_start_from_the_file_of_their_arch(path):
    backbone = Config.fromfile(path).model.backbone
    norm = backbone.get('norm', 'ln')
    name = backbone.arch + ('_bn' if norm == 'bn' else '')
    assert backbone.init_cfg.checkpoint == f'polynext://{name}'
    published = PUBLISHED[name]
    assert (published.arch, published.norm, published.holds) == (backbone.arch, norm, 'imagenet')


def test_there_is_a_config_for_every_imagenet_file():
    assert {path.stem for path in CONFIGS} == {f'upernet_{name}_ade20k' for name in IMAGENET}
