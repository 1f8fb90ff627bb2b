"""Values of --cfg-options: as mm's tools read them, and paths as they are."""

import pytest

from polynext_mm.commands.arguments import setting


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1', 1),
        ('-1', -1),
        ('1e-3', 1e-3),
        ('true', True),
        ('None', None),
        ('', ''),
        ('mIoU', 'mIoU'),
        ('a,b', ['a', 'b']),
        ('0.1,', [0.1]),
        ('[]', []),
        ('[1]', [1]),
        ('(1, 2)', (1, 2)),
        ('[(1,2),[a,b],c]', [(1, 2), ['a', 'b'], 'c']),
        ('[1,2],[3]', [[1, 2], [3]]),
        ("['mIoU','mDice']", ['mIoU', 'mDice']),
        ('coco/bbox_mAP,coco/segm_mAP', ['coco/bbox_mAP', 'coco/segm_mAP']),
        ('/a/x.json,/b/y.json', ['/a/x.json', '/b/y.json']),
    ],
)
def test_values_are_read_as_mm_reads_them(text, value):
    assert setting(text) == value
    assert type(setting(text)) is type(value)


@pytest.mark.parametrize(
    'path',
    ['/data/a,b', '/data/[x]', '/data/(a,b)', '../my data,1', 'runs/a,b', 'runs/[x]', "it's/x"],
)
def test_paths_stay_as_they_are(path):
    assert setting(path) == path
    assert setting(f"'{path}'" if "'" not in path else f'"{path}"') == path


def test_a_file_that_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a,b', '[x,y]'):
        (tmp_path / name).mkdir()
        assert setting(name) == name


@pytest.mark.parametrize('text', ['[a,b', 'a],b', '(a,b]', "['a,b]"])
def test_brackets_that_are_not_closed(text):
    with pytest.raises(ValueError, match='brackets'):
        setting(text)
