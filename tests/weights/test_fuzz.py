"""Damaged files end in our error or in the right weights, whatever the damage.

Mutations are drawn from a seed: bits flipped, the file cut, ranges inserted, removed, overwritten,
copied over others, and members of archives swapped. Archives have checksums of their own, and files
that we write have one beside them: damage never loads as other weights. The other formats have
none, so that damage to single numbers cannot be known: finite weights of the right shapes may load.
"""

import io
import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polynext_mm import weights
from polynext_mm.weights import CheckpointError
from polynext_mm.weights.containers import checksum_path, sha256_of
from tests.helpers.networks import build
from tests.helpers.tiny import randomized

# which docs/reliability.md names
FAST, SLOW, RESUMED = 60, 1000, 500


def training_checkpoint(state_dict: dict[str, Tensor]) -> dict:
    """A checkpoint as of a training: with logs, optimizer and random states."""
    from mmengine.logging import HistoryBuffer

    from polynext_mm.engine.random_numbers import random_state

    return dict(
        meta=dict(epoch=0, iter=2, seed=0, cfg='model = dict()'),
        state_dict=state_dict,
        message_hub=dict(
            log_scalars={'train/loss': HistoryBuffer([0.5, 0.25], [1, 1])},
            runtime_info=dict(iter=2, best_score=0.5),
            resumed_keys={'train/loss': True},
        ),
        optimizer=dict(
            state={0: dict(step=torch.tensor(2.0), exp_avg=torch.ones(8, 3, 7, 7))},
            param_groups=[dict(lr=0.1, params=[0])],
        ),
        polynext_resume=dict(random_states=[random_state()], saved_at=1.0),
    )


WRITERS: dict[str, tuple[str, Callable[[dict, Path], None]]] = {
    'archive': ('.pt', torch.save),
    'older': ('.pt', lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False)),
    'safetensors': ('.safetensors', save_file),
    'training': ('.pth', lambda w, path: torch.save(training_checkpoint(w), path)),
}
# those whose damage is found without a checksum beside them
CHECKED = ('archive', 'training')


def mutated(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return what was done to a file's content, and the result."""
    data = bytearray(content)
    place, length = (
        chance.randrange(len(data)),
        min(chance.choice([1, 4, 32, 1000]), len(data) // 4),
    )
    # half of all at the ends, where headers, directories and most of the structure are
    if chance.random() < 0.5:
        place = min(place % 2000, len(data) - 1)
        place = place if chance.random() < 0.5 else len(data) - 1 - place
    source = chance.randrange(len(data) - length)
    kind = chance.choice(['flip', 'flips', 'cut', 'insert', 'remove', 'overwrite', 'copy', 'swap'])
    if kind == 'flip':
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 'flips':
        for _ in range(length):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 'cut':
        del data[place:]
    elif kind == 'insert':
        data[place:place] = chance.randbytes(length)
    elif kind == 'remove':
        del data[place : place + length]
    elif kind == 'overwrite':
        data[place : place + length] = chance.choice([bytes(length), chance.randbytes(length)])
    elif kind == 'copy':
        data[place : place + length] = data[source : source + length]
    else:
        data = bytearray(_swapped(bytes(data), chance))
    return kind, bytes(data)


def _swapped(content: bytes, chance: random.Random) -> bytes:
    """Return a file with the data of two members, or of two ranges where it has none, swapped."""
    if content[:2] == b'PK':
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = [info for info in archive.infolist() if '/data/' in info.filename]
        sizes = Counter(info.file_size for info in infos)
        twins = [info for info in infos if sizes[info.file_size] > 1] or infos
        one = chance.choice(twins)
        other = chance.choice([info for info in infos if info.file_size == one.file_size])
        spans = [_span(content, info) for info in (one, other)]
    else:
        size = chance.choice([4, 64, 512])
        spans = [
            (start, start + size) for start in (chance.randrange(len(content) - size) for _ in 'ab')
        ]
    (a, b), (c, d) = sorted(spans)
    if b > c:
        return content
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _span(content: bytes, info: zipfile.ZipInfo) -> tuple[int, int]:
    header = info.header_offset
    names = int.from_bytes(content[header + 26 : header + 28], 'little')
    extra = int.from_bytes(content[header + 28 : header + 30], 'little')
    start = header + 30 + names + extra
    return start, start + info.file_size


def outcome(path: Path, right: dict[str, Tensor], verified: bool) -> str:
    """Load a file; return 'error' or 'weights', and fail for anything else."""
    model = build()
    try:
        weights.load(model, path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2000
        return 'error'
    loaded = model.state_dict()
    for key, value in right.items():
        assert loaded[key].shape == value.shape and loaded[key].isfinite().all()
        assert not verified or torch.equal(loaded[key], value), key
    return 'weights'


def fuzz(folder: Path, count: int, seed: int) -> dict[str, Counter]:
    """Load ``count`` mutations over all formats; return how they ended, by format."""
    right = randomized(build()).state_dict()
    contents = {}
    for name, (suffix, write) in WRITERS.items():
        path = folder / f'{name}{suffix}'
        write(right, path)
        assert outcome(path, right, True) == 'weights'
        contents[path] = path.read_bytes()
    chance = random.Random(seed)
    ends = {name: Counter() for name in WRITERS}
    for number in range(count):
        path = list(contents)[number % len(contents)]
        beside = checksum_path(path)
        path.write_bytes(contents[path])
        # every other time, as files of ours are
        has_checksum = number // len(contents) % 2 == 1
        if has_checksum:
            beside.write_text(f'{sha256_of(path)}  {path.name}\n')
        else:
            beside.unlink(missing_ok=True)
        kind, content = mutated(contents[path], chance)
        path.write_bytes(content)
        verified = has_checksum or path.stem in CHECKED or content == contents[path]
        try:
            ends[path.stem][outcome(path, right, verified)] += 1
        except BaseException as error:
            raise AssertionError(
                f'mutation {number} of seed {seed}: {kind} of {path.name}'
            ) from error
    return ends


def test_sixty_mutations(tmp_path):
    ends = fuzz(tmp_path, FAST, seed=1)
    assert sum(map(sum, (end.values() for end in ends.values()))) == FAST


@pytest.mark.slow
def test_a_thousand_mutations(tmp_path):
    ends = fuzz(tmp_path, SLOW, seed=2)
    assert [sum(end.values()) for end in ends.values()] == [SLOW // 4] * 4
    for name, end in ends.items():
        # not all of it by refusing everything, and not all of it by chance
        assert end['error'] > 150, (name, end)
    assert ends['archive']['weights'] and ends['older']['weights']


@pytest.mark.slow
def test_five_hundred_mutations_of_what_a_resume_reads(tmp_path):
    """Not the weights alone: whatever of a damaged training checkpoint is read is right."""
    right = randomized(build()).state_dict()
    path = tmp_path / 'iter_2.pth'
    torch.save(training_checkpoint(right), path)
    content, expected = path.read_bytes(), described(weights.read(path))
    chance = random.Random(3)
    for _ in range(RESUMED):
        kind, data = mutated(content, chance)
        path.write_bytes(data)
        try:
            found = described(weights.read(path))
        except CheckpointError as error:
            assert re.search(re.escape(str(path)), str(error))
        else:
            assert found == expected, kind


def described(value) -> object:
    """A value in a form that compares."""
    if isinstance(value, Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if hasattr(value, 'data') and not isinstance(value, (str, bytes)):
        return [part.tolist() for part in value.data]
    return value
