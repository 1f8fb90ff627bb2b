"""Split a list of images into training and validation, keeping similar images together."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from .files import fingerprints

SHARE = 0.2  # of the images, for validation
_MOST = 1000  # images for validation
_BITS = 10  # how many of 256 bits may differ between similar images
_AHEAD = 200  # frames and crops of one scene have consecutive names
_TRIES = 20


def alike(paths: Sequence[Path]) -> list[list[int]]:
    """Group the positions in ``paths`` whose images are nearly the same; other groups are single.

    Each image is compared with the next 200 by name, and with all whose fingerprint is identical.
    """
    marks = fingerprints(paths)
    bits = np.unpackbits(marks, axis=1)
    parents = list(range(len(paths)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[bytes, int] = {}
    for i, mark in enumerate(marks):
        if not mark.any():  # a flat image is similar to no other
            continue
        near = np.flatnonzero((bits[i + 1 : i + 1 + _AHEAD] != bits[i]).sum(1) <= _BITS)
        for j in (first.setdefault(mark.tobytes(), i), *(i + 1 + near)):
            parents[root(int(j))] = root(i)
    groups = defaultdict(list)
    for i in range(len(paths)):
        groups[root(i)].append(i)
    return list(groups.values())


def split(
    groups: Sequence[Sequence[int]], classes: Mapping[int, Collection[int]], seed: int = 0
) -> tuple[list[int], list[int]]:
    """Divide groups of images into training and validation.

    It is the first of 20 random divisions that has the most classes on both sides.

    Args:
        groups: Positions of images, each once, as from :func:`alike`.
        classes: The classes in the image at each position.
        seed: Seed of the random numbers.

    Returns:
        tuple: Positions for training and for validation, sorted.
    """
    total = sum(map(len, groups))
    wanted = min(max(1, round(SHARE * total)), _MOST)
    best: tuple[int, list[int], list[int]] | None = None
    for attempt in range(_TRIES):
        order = list(groups)
        random.Random(f'{seed} {attempt}').shuffle(order)
        sides: tuple[list[int], list[int]] = ([], [])
        for group in order:
            fits = len(sides[1]) + len(group) <= max(wanted, 1) and len(group) < total
            sides[bool(fits)].extend(group)
        if not sides[1] and len(order) > 1:
            smallest = min(order, key=len)
            sides = ([i for i in sides[0] if i not in smallest], list(smallest))
        held = [{c for i in side for c in classes.get(i, ())} for side in sides]
        score = len(held[0] & held[1])
        if best is None or score > best[0]:
            best = score, sorted(sides[0]), sorted(sides[1])
    assert best is not None
    return best[1], best[2]
