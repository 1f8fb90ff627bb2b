"""Actions that wait for a module to be imported."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from polynext_mm.compat import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The path of a module ``awaited`` that may be imported."""
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / 'awaited.py'
    path.write_text('value = 3\n')
    yield path
    sys.modules.pop('awaited', None)


def test_it_happens_once_after_the_module_has_been_executed(module):
    seen = []
    when_imported('awaited', lambda: seen.append(sys.modules['awaited'].value), 'failed')
    assert importlib.util.find_spec('awaited').origin == str(module)
    assert seen == [] and 'awaited' not in sys.modules
    awaited = importlib.import_module('awaited')
    assert seen == [3]
    importlib.reload(awaited)
    assert seen == [3]


def test_a_module_that_is_there_is_not_waited_for(module):
    importlib.import_module('awaited')
    seen = []
    when_imported('awaited', lambda: seen.append(True), 'failed')
    assert seen == [True]


def test_the_module_is_as_without_an_action(module):
    when_imported('awaited', lambda: None, 'failed')
    awaited = importlib.import_module('awaited')
    assert inspect.getsource(awaited) == module.read_text()
    assert awaited.__spec__.loader is awaited.__loader__


def test_a_module_that_is_not_there_is_missing_as_usual(module):
    when_imported('awaited.never', lambda: None, 'failed')
    module.unlink()
    when_imported('awaited', lambda: pytest.fail('it was not imported'), 'failed')
    with pytest.raises(ModuleNotFoundError, match="No module named 'awaited'"):
        importlib.import_module('awaited')


def test_a_module_that_fails_is_waited_for_still(module):
    seen = []
    when_imported('awaited', lambda: seen.append(True), 'failed')
    module.write_text('raise RuntimeError')
    with pytest.raises(RuntimeError):
        importlib.import_module('awaited')
    assert seen == []
    module.write_text('value = "four"')
    importlib.import_module('awaited')
    assert seen == [True]


def test_an_action_that_fails_is_logged_once_and_the_import_succeeds(module, caplog):
    def action():
        raise RuntimeError('in the\naction')

    when_imported('awaited', action, 'no A without B: install B')
    assert importlib.import_module('awaited').value == 3
    del sys.modules['awaited']
    importlib.import_module('awaited')
    (record,) = caplog.records
    message = 'no A without B: install B (RuntimeError: in the action)'
    assert (record.levelname, record.getMessage()) == ('WARNING', message)


def test_an_action_that_fails_at_once_is_an_error(module):
    importlib.import_module('awaited')
    with pytest.raises(ZeroDivisionError):
        when_imported('awaited', lambda: 1 / 0, 'failed')
