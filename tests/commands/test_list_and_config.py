"""polynext-mm list and config."""

import pytest
import torch
from mmengine.config import Config

from polynext_mm.commands import config, download, list_all
from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED
from polynext_mm.weights.downloads import cached_path
from tests.helpers.files import ROOT


def listed(capsys, *arguments) -> list[str]:
    assert list_all.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_names_of_everything(capsys):
    assert listed(capsys, 'archs', '--names') == list(ARCHS)
    configs = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
    configs += ['_base_/own_detection', '_base_/own_segmentation']
    assert sorted(listed(capsys, 'configs', '--names')) == sorted(configs)
    assert listed(capsys, 'files', '--names') == [f'polynext://{name}' for name in PUBLISHED]
    everything = listed(capsys, '--names')
    assert len(everything) == len(ARCHS) + len(configs) + len(PUBLISHED)


def test_words_filter_rows(capsys):
    header, *rows = listed(capsys, 'configs', 'UperNet', 'apolynext', 's_ade')
    assert header.split() == ['config', 'backbone', 'head', *header.split()[3:]]
    assert [row.split()[0] for row in rows] == ['upernet_apolynext_s_ade20k']
    assert '49.9 mIoU' in rows[0] and '](' not in rows[0]
    assert [row.split()[0] for row in listed(capsys, 'configs', 'own_seg')[1:]] == [
        '_base_/own_segmentation'
    ]


def test_files_say_where_they_come_from_and_where_they_go(capsys):
    header, row = listed(capsys, 'files', 'uper_c')
    file = PUBLISHED['uper_cpolynexts']
    assert header.split()[-4:] == ['published', 'MB', 'url', 'file']
    assert row.split()[-4:] == ['50.6', '?', file.url, str(cached_path(file.url))]


def test_download_prints_the_path_and_names_what_there_is(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    path = cached_path(PUBLISHED['cpolynext_t'].url)
    path.parent.mkdir()
    path.write_bytes(b'downloaded before')
    for name in ('cpolynext_t', 'polynext://cpolynext_t'):
        assert download.main([name]) == 0
        assert capsys.readouterr().out.strip() == str(path)
    with pytest.raises(SystemExit, match='is not a published file; these are: polynext://cpoly'):
        download.main(['cpolynext_xl'])


def test_nothing_found_is_an_error(capsys):
    assert list_all.main(['configs', 'upernet', 'zebra']) == 1
    assert 'nothing in configs has all of: upernet zebra' in capsys.readouterr().err


def test_a_config_in_full_is_that_config(capsys, tmp_path):
    name = 'upernet_cpolynext_s_ade20k'
    assert config.main([name, '--cfg-options', 'model.decode_head.num_classes=7']) == 0
    path = tmp_path / 'full.py'
    path.write_text(capsys.readouterr().out)
    expected = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    expected.merge_from_dict({'model.decode_head.num_classes': 7})
    assert Config.fromfile(path).to_dict() == expected.to_dict()


def test_a_config_whose_data_are_moved(capsys):
    assert config.main(['upernet_cpolynext_s_ade20k', '--cfg-options', 'data_root=/data']) == 0
    printed = capsys.readouterr().out.replace(' ', '')
    assert "data_root='/data'" in printed.split('train_dataloader=dict(')[1]
    with pytest.raises(SystemExit, match='the data sets of .* have no common data_root'):
        config.main(['_base_/models/upernet_polynext', '--cfg-options', 'data_root=/data'])


def test_brackets_that_are_not_closed(capsys):
    with pytest.raises(SystemExit):
        config.main(['upernet_cpolynext_s_ade20k', '--cfg-options', 'crop_size=[1,2'])
    assert 'brackets or quotes are not closed' in capsys.readouterr().err


def test_the_path_of_a_config(capsys):
    assert config.main(['retinanet_cpolynext_t_coco_1x', '--path']) == 0
    expected = str(ROOT / 'configs' / 'retinanet_cpolynext_t_coco_1x.py')
    assert capsys.readouterr().out.strip() == expected
    with pytest.raises(SystemExit, match='there is no config absent'):
        config.main(['absent', '--path'])
