"""Which set of mm packages is there, and what someone who has none is told to install."""

import re
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from polynext_mm.compat import check_stack, packages, require_mmengine, stack_name
from tests.helpers.files import ROOT


@pytest.mark.parametrize(
    ('names', 'stack'),
    [
        (['numpy', 'onedl_mmcv'], 'onedl'),
        (['mmcv-lite', 'onedl-mmengine'], 'openmmlab'),
        (['MMEngine'], 'openmmlab'),
        (['numpy'], None),
        ([None], None),
    ],
)
def test_the_stack_is_the_first_on_the_path(monkeypatch, names, stack):
    found = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(metadata, 'distributions', lambda: iter(found))
    assert stack_name() == stack


@pytest.mark.parametrize(
    ('stack', 'extra'), [(None, 'onedl'), ('onedl', 'onedl'), ('openmmlab', 'openmmlab')]
)
@pytest.mark.parametrize(
    ('check', 'hidden'),
    [(check_stack, 'mmengine'), (require_mmengine, 'mmengine')],
)
def test_the_error_lists_the_packages_that_go_with_what_is_there(
    monkeypatch, stack, extra, check, hidden
):
    check()
    monkeypatch.setattr(packages, 'stack_name', lambda: stack)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ImportError) as caught:
        check()
    assert caught.value.name == hidden
    message = str(caught.value)
    assert message.startswith(
        f'polynext_mm needs {hidden}, which is not installed: run `pip install '
    )
    assert f"`pip install '.[{extra}]'` in a clone of polynext_mm" in message
    command = re.search('`pip install ([^`]*)`, or', message)[1]
    assert (
        command.split()
        == {
            'onedl': [
                "'onedl-mmengine<0.11,>=0.10.12'",
                "'onedl-mmcv<2.4,>=2.3.6'",
                "'onedl-mmsegmentation<1.5,>=1.4.2'",
                "'onedl-mmdetection<3.6,>=3.5.1'",
            ],
            'openmmlab': [
                "'mmengine<1,>=0.10.7'",
                "'mmsegmentation<1.3,>=1.2.2'",
                "'mmdet<3.4,>=3.3.0'",
                'ftfy',
                'regex',
                "'setuptools<81'",
            ],
        }[extra]
    )


@pytest.mark.parametrize(
    ('stack', 'remedy'),
    [
        ('openmmlab', "`pip install 'mmcv-lite>=2.1,<2.2'`, or"),
        ('onedl', "'onedl-mmcv<2.4,>=2.3.6'"),
    ],
)
def test_a_missing_mmcv_is_of_the_set_that_is_there(monkeypatch, stack, remedy):
    monkeypatch.setattr(packages, 'stack_name', lambda: stack)
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(ImportError, match='polynext_mm needs mmcv') as caught:
        check_stack()
    assert remedy in str(caught.value)


def test_where_this_package_is_not_installed_either_the_clone_is_the_way(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, 'requires', not_installed)
    monkeypatch.setattr(packages, 'stack_name', lambda: None)
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(ImportError, match=r"run `pip install '\.\[onedl\]'` in a clone of"):
        check_stack()


@pytest.mark.parametrize('extra', ['onedl', 'openmmlab'])
def test_the_environment_that_is_tested_has_the_versions_of_the_extra(extra):
    lines = (ROOT / 'requirements' / f'{extra}.txt').read_text().splitlines()
    tested = dict(line.split('==') for line in lines if '==' in line)
    required = [Requirement(line) for line in metadata.requires('polynext-mm') if extra in line]
    ranges = [package for package in required if 'mm' in package.name]
    assert len(ranges) == {'onedl': 4, 'openmmlab': 3}[extra]
    assert all(package.specifier.contains(tested[package.name]) for package in ranges)
