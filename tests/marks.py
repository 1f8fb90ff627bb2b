"""Which tests, or values of a parameter of theirs, run where: slow ones, newer torch."""

from collections.abc import Collection, Iterable

import pytest

from polynext_mm.compat.torch_features import Feature


def some_slow(values: Iterable, slow: Collection) -> list:
    """Return the values of a parameter, those in ``slow`` marked as slow."""
    return [
        pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values
    ]


def needs(feature: Feature) -> pytest.MarkDecorator:
    """Return a mark that skips a test where torch lacks what it needs, and says so."""
    return pytest.mark.skipif(not feature.is_there, reason=feature.what_is_missing())


def require(feature: Feature) -> None:
    """Skip a whole file of tests where torch lacks what its imports need."""
    if not feature.is_there:
        pytest.skip(feature.what_is_missing(), allow_module_level=True)
