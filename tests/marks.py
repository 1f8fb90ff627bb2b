"""Which values of a test's parameter are left to ``make test-slow``."""

from collections.abc import Collection, Iterable

import pytest


def some_slow(values: Iterable, slow: Collection) -> list:
    """Return the values of a parameter, those in ``slow`` marked as slow."""
    return [
        pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values
    ]
