"""Scenes of the demos' sample."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from tests.helpers.programs import script


def sample_as_ade20k(folder: Path, images: int = 4) -> Path:
    """Make scenes of the demos' sample in ADE20K's layout and return its root."""
    make_materials = script('demo/make_materials')

    root = folder / 'ADEChallengeData2016'
    for split, name in (('training', 'training'), ('tuning', 'validation')):
        make_materials.make_split(root, split, images)
        for kind in ('images', 'annotations'):
            (root / kind / split).rename(root / kind / name)
    return root


def _kept(prefix: str) -> Path:
    """Return a new folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def ade20k_scenes() -> Path:
    """Make four scenes of each split in ADE20K's layout, once, for tests that only read them."""
    return sample_as_ade20k(_kept('ade20k_scenes_'))


@functools.cache
def few_scenes() -> Path:
    """Make a few scenes of each split of the demos' sample, once, and return their folder."""
    make_materials = script('demo/make_materials')

    folder = _kept('few_scenes_')
    for split in make_materials.SPLITS:
        make_materials.make_split(folder, split, scenes=8)
    return folder
