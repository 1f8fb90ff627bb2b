"""What several tests need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def zipped(*groups: Iterable) -> Iterator[tuple]:
    """Zip groups of equal length: ``zip(strict=True)``, which Python 3.9 lacks."""
    lists = [list(group) for group in groups]
    assert len(set(map(len, lists))) == 1, f'of different lengths: {list(map(len, lists))}'
    return zip(*lists)
