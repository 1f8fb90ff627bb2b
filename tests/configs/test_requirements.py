"""The pinned requirements, checked offline."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT
from polynext_mm.compat.packages import stack_name

OLDEST_PYTHON = re.search(
    r"^requires-python = '>=(.+)'$", (ROOT / 'pyproject.toml').read_text(), re.MULTILINE
)[1]


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / 'requirements' / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


@pytest.mark.parametrize(
    'pin',
    [pin for file in ('torch', 'base', stack_name()) for pin in pins(f'{file}.txt')],
    ids=str,
)
def test_a_pin_is_installed_and_supports_the_oldest_python(pin):
    installed = metadata.distribution(pin.name)
    assert pin.specifier.contains(installed.version), 'run `make install`'
    supported = SpecifierSet(installed.metadata['Requires-Python'] or '')
    assert supported.contains(OLDEST_PYTHON), f'{pin} needs Python {supported}'
