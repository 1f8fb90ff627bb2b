"""The table of published files agrees with the networks and with the configs."""

import pytest

from helpers import ROOT, Config
from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED

CONFIGS = sorted((ROOT / 'configs').glob('*polynext_?_ade20k.py'))


def test_every_arch_has_its_imagenet_file():
    archs = {file.arch for file in PUBLISHED.values() if file.holds == 'imagenet'}
    assert archs == set(ARCHS)


def test_entries_are_consistent():
    assert len({file.url for file in PUBLISHED.values()}) == len(PUBLISHED) == 10
    folder = PUBLISHED['cpolynext_t'].url.rpartition('/')[0]
    assert folder.startswith('https://')
    for name, file in PUBLISHED.items():
        assert file.arch in ARCHS
        assert file.file.rpartition('.')[0] == name
        assert file.url == f'{folder}/{file.file}'
        assert name == (
            file.arch if file.holds == 'imagenet' else 'uper_' + file.arch.replace('_', '')
        )


def test_the_address_of_the_release_stands_in_one_file():
    host = PUBLISHED['cpolynext_t'].url.split('/')[2]
    folders = ('benchmarks', 'configs', 'demo', 'docs', 'polynext_mm', 'tests', 'tools')
    files = [path for folder in folders for path in (ROOT / folder).rglob('*.*')]
    texts = [path for path in files if path.suffix in ('.md', '.py', '.sh')]
    assert ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py' in texts
    found = [path.name for path in [*texts, ROOT / 'README.md'] if host in path.read_text()]
    assert found == ['published.py']


@pytest.mark.parametrize(
    ('name', 'figure'),
    [
        ('cpolynext_t', 80.2),
        ('cpolynext_s', 83.9),
        ('cpolynext_b', 84.7),
        ('cpolynext_l', 84.9),
        ('apolynext_t', 80.9),
        ('apolynext_s', 84.3),
        ('apolynext_b', 84.9),
        ('apolynext_l', 85.2),
        ('uper_cpolynexts', 50.6),
        ('uper_apolynexts', 49.9),
    ],
)
def test_figures(name, figure):
    assert PUBLISHED[name].figure == figure


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_start_from_the_file_of_their_arch(path):
    backbone = Config.fromfile(path).model.backbone
    assert backbone.init_cfg.checkpoint == f'polynext://{backbone.arch}'
    assert PUBLISHED[backbone.arch].holds == 'imagenet'


def test_there_is_a_config_for_every_arch():
    assert {path.stem for path in CONFIGS} == {f'upernet_{arch}_ade20k' for arch in ARCHS}
