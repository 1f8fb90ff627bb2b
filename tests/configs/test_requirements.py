"""The pinned requirements, checked offline."""

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT
from polynext_mm.compat.packages import stack_name

# the files of each environment, and the oldest Python that `make` builds it for
FILES, OLDEST_PYTHON = {
    'onedl': (('torch', 'base', 'onedl'), '3.10'),
    'openmmlab': (('openmmlab-base', 'openmmlab'), '3.9'),
}[stack_name()]


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / 'requirements' / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


@pytest.mark.parametrize(
    'pin',
    [pin for file in FILES for pin in pins(f'{file}.txt')],
    ids=str,
)
def test_a_pin_is_installed_and_supports_the_oldest_python(pin):
    installed = metadata.distribution(pin.name)
    assert pin.specifier.contains(installed.version), 'build the environment again'
    supported = SpecifierSet(installed.metadata['Requires-Python'] or '')
    assert supported.contains(OLDEST_PYTHON), f'{pin} needs Python {supported}'
