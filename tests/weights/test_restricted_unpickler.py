"""The reader for torch before 2.6, on every torch: what it reads, and what it refuses.

With an older torch the other tests of files go through it, too.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from polynext_mm.weights.restricted_unpickler import load_restricted
from polynext_mm.weights.stand_ins import ALLOWED, rebuilt
from tests.weights.hostile import CODE, archive, older, tensor, weights_and

LEGACY = dict(_use_new_zipfile_serialization=False)


def read(path, **settings):
    return rebuilt(load_restricted(path, 'cpu', ALLOWED, **settings))


@pytest.fixture
def content():
    """A checkpoint with the kinds of values that one holds, two tensors in one memory included."""
    whole = torch.arange(12.0).view(3, 4)
    model = torch.nn.BatchNorm1d(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(whole).square().sum().backward()
    optimizer.step()
    return dict(
        state_dict=OrderedDict(model.state_dict(), whole=whole, row=whole[1], empty=torch.empty(0)),
        parameter=torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        half=torch.ones(3).bfloat16(),
        optimizer=optimizer.state_dict(),
        meta=dict(kind=torch.float16, text='ä', data=b'\x00\xff', none=None),
        others=[{1, 2}, (1.5, True), 10**30, np.arange(3), np.float64(2.5), 1j],
    )


def flat(value):
    """Texts of all that is in a value, tensors and arrays by their numbers."""
    if isinstance(value, dict):
        return [(repr(key), flat(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(flat, value)]
    if isinstance(value, torch.Tensor):
        return str(type(value)), str(value.dtype), value.tolist(), value.requires_grad
    return str(type(value)), value.tolist() if isinstance(value, np.ndarray) else repr(value)


@pytest.mark.parametrize('settings', [{}, LEGACY], ids=['archive', 'older'])
@pytest.mark.parametrize('mapped', [False, True])
def test_it_reads_what_was_saved(path, content, settings, mapped):
    torch.save(content, path, **settings)
    found = read(path, mapped=mapped)
    assert flat(found) == flat(content)
    weights = found['state_dict']
    weights['whole'][1, 0] = -1  # the file is not changed
    assert weights['row'][0] == -1
    assert flat(read(path)) == flat(content)


# A function of torch's that is allowed and not called is a value to both readers; what is no plain
# value is refused later (test_hostile_files.py).
CALLS = {name: value for name, value in CODE.items() if name != 'a function alone'}


@pytest.mark.parametrize('value', CALLS.values(), ids=CALLS)
@pytest.mark.parametrize('write', [archive, older])
def test_no_pickle_calls_anything(path, value, write):
    write(path, weights_and(value), *([[], b''] if write is older else []))
    with pytest.raises(Exception):  # noqa: B017 - of many kinds; none of these has an effect
        read(path)


def test_a_storage_is_no_larger_than_its_member(path):
    archive(path, weights_and(tensor(6, (6,), (1,))), {'0': bytes(8)})
    with pytest.raises(ValueError, match='24 bytes in a member of 8'):
        read(path)


def test_a_tar_archive_is_not_unpacked(path):
    """Which torch before 2.6 does, whatever is allowed (CVE-2025-32434)."""
    with tarfile.open(path, 'w') as file:
        for name in ('storages', 'tensors', 'pickle'):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(Exception, match='not a tar archive'):
        read(path)
