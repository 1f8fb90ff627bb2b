"""demo/demo.ipynb: without outputs, and its cells run in order."""

import json
import re

import pytest

from tests.docs.pages import replaced
from tests.helpers.files import ROOT

NOTEBOOK = ROOT / 'demo' / 'demo.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
CODE = [cell for cell in CELLS if cell['cell_type'] == 'code']


def test_it_is_kept_without_outputs():
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in CODE)


def test_its_links_lead_somewhere():
    text = ''.join(line for cell in CELLS for line in cell['source'])
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)


@pytest.mark.slow
def test_its_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.syspath_prepend(NOTEBOOK.parent)
    program = '\n\n'.join(''.join(cell['source']) for cell in CODE)
    program = replaced(
        program,
        ("'../work_dirs/notebook'", repr(str(tmp_path))),
        ('iterations = 300', 'iterations = 32'),
    )
    names = {}
    exec(compile(program, str(NOTEBOOK), 'exec'), names)
    assert [feature.shape[1] for feature in names['features']] == [24, 48, 96, 96]
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    assert 'mIoU' in capsys.readouterr().out
