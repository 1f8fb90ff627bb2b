"""Files made on purpose do nothing but raise our error, whatever they hold."""

import collections
import datetime
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner, load_checkpoint

from polynext_mm import weights
from polynext_mm.compat.torch_features import SAFE_READER
from polynext_mm.weights import CheckpointError, containers
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.configs import TINY_NETWORK, build_model, tiny_config
from tests.helpers.networks import build
from tests.helpers.programs import python
from tests.helpers.tiny import randomized
from tests.marks import needs
from tests.weights.hostile import CODE, archive, odd_weights, older, tensor, weights_and


def refusal(path, read=weights.read) -> str:
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read(path)
    return str(caught.value)


# Code


@pytest.mark.parametrize('value', CODE.values(), ids=CODE)
@pytest.mark.parametrize('write', [archive, older])
@pytest.mark.parametrize('protocol', [2, 4])
def test_no_pickle_calls_anything(path, value, write, protocol):
    write(path, weights_and(value, protocol), *([[], b''] if write is older else []))
    assert refusal(path)


def test_what_these_files_are_made_with_makes_files_that_load(path):
    """Else the tests above would pass for any file."""
    data = torch.arange(6.0).numpy().tobytes()
    archive(path, weights_and(tensor(6, (2, 3), (3, 1))), {'0': data})
    assert torch.equal(
        weights.read(path)['state_dict']['stem.weight'], torch.arange(6.0).reshape(2, 3)
    )
    size = (6).to_bytes(8, 'little')
    older(path, weights_and(tensor(6, (2, 3), (3, 1))), ['0'], size + data)
    assert torch.equal(
        weights.read(path)['state_dict']['stem.weight'], torch.arange(6.0).reshape(2, 3)
    )


def test_a_numpy_dtype_and_numbers_are_values(path):
    """Read by torch, a dtype made on purpose crashes the interpreter."""
    content = dict(
        state_dict={'a.weight': torch.ones(2)},
        meta=dict(dtype=np.dtype('f8'), scalar=np.float32(0.5), array=np.arange(6).reshape(2, 3)),
    )
    torch.save(content, path)
    meta = weights.read(path)['meta']
    assert (meta['dtype'], meta['scalar']) == ('f8', 0.5)
    assert meta['array'].tolist() == [[0, 1, 2], [3, 4, 5]]


# What honest files hold


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('is_archive', [True, False])
def test_plain_values_are_read_whatever_the_protocol(path, protocol, is_archive):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        state_dict={'a.weight': torch.ones(2)},
        path=Path('a/b'),
        time=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        sets=({1, 2}, frozenset([3])),
        counts=collections.Counter('aab'),
        numbers=list(range(300_000)),
        large=2**70,
        array=np.arange(6.0).reshape(2, 3),
        # read as a list and as dicts
        deque=collections.deque([1, 2], maxlen=5),
        factory=collections.defaultdict(list, a=[1]),
        config=ConfigDict(a=dict(b=1)),
        history=history,
    )
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_archive)
    found = containers.load(path)
    array, found_history = found.pop('array'), found.pop('history')
    assert array.tolist() == content.pop('array').tolist()
    assert found_history.data[0].tolist() == [1.0, 2.0]
    del content['history'], content['state_dict'], found['state_dict']
    assert found == {**content, 'deque': [1, 2]}


@needs(SAFE_READER)  # before, torch's own is not used
def test_what_torch_lacks_is_not_called_damage(path, monkeypatch):
    torch.save({'a.weight': torch.ones(2)}, path)

    def missing(*_, **__):
        raise AttributeError("module 'torch' has no attribute 'something'")

    monkeypatch.setattr(torch, 'load', missing)
    message = refusal(path)
    assert 'cannot be read with torch' in message and 'damaged' not in message


# Checksums and damage


def test_a_flipped_bit_in_the_weights_is_found(path):
    torch.save({'a.weight': torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(content)
    assert 'damaged' in refusal(path)


@pytest.mark.heavy
@pytest.mark.parametrize('suffix', ['.pt', '.legacy.pt', '.safetensors'])
def test_a_checksum_beside_a_file_is_verified(tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f'weights{suffix}'
    if suffix == '.safetensors':
        save_file({'a.weight': torch.ones(1000)}, path)
    else:
        torch.save({'a.weight': torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    python('-c', CHECKSUM, path)  # as the program sha256sum writes it
    assert weights.read(path)['state_dict']['a.weight'].sum() == 1000
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f'does not match its checksum {path.name}.sha256' in refusal(path)


CHECKSUM = """
import hashlib, pathlib, sys
path = pathlib.Path(sys.argv[1])
line = f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}'
path.with_name(path.name + '.sha256').write_text(line)
"""


def test_a_converted_file_has_its_checksum_beside_it(tmp_path):
    torch.save(imagenet_weights(), tmp_path / 'authors.pt')
    weights.convert(tmp_path / 'authors.pt', tmp_path / 'ours.pth')
    beside = tmp_path / 'ours.pth.sha256'
    assert beside.read_text().split()[1] == 'ours.pth'
    weights.read(tmp_path / 'ours.pth')
    weights.convert(tmp_path / 'ours.pth', tmp_path / 'ours.pth', to='authors', overwrite=True)
    weights.read(tmp_path / 'ours.pth')
    beside.write_text('0' * 64)
    assert 'ours.pth.sha256' in refusal(tmp_path / 'ours.pth')


# Values


@pytest.fixture(scope='module')
def model():
    """A segmentor with the tiny network, and its weights."""
    return randomized(build_model(tiny_config('', '', **TINY_NETWORK)))


ODD = list(odd_weights(torch.ones(2)))


def by_mm(model, path):
    load_checkpoint(model, str(path))


def by_resuming(model, path):
    """As in a training with EMAHook, for which a file holds the weights twice."""
    runner = Runner(
        model,
        str(path.parent),
        custom_hooks=[dict(type='EMAHook'), dict(type='CheckpointGuardHook')],
        resume=True,
        experiment_name=f'average_{next(NUMBERS)}',
        default_scope='mmseg',
    )
    runner.call_hook('before_run')
    runner.resume(str(path))


NUMBERS = itertools.count()


def save_for(load, path, content, model):
    """Write weights where a way to load looks for them."""
    if load is by_resuming:
        torch.save(
            dict(
                meta=dict(epoch=0, iter=2, seed=0),
                message_hub=dict(log_scalars={}, runtime_info={}),
                state_dict=model.state_dict(),
                ema_state_dict={f'module.{key}': value for key, value in content.items()},
            ),
            path,
        )
    else:
        torch.save(dict(meta={}, state_dict=content), path)


@pytest.mark.heavy
def test_a_whole_average_is_resumed(path, model):
    """Else the tests of averages below would pass for any file."""
    save_for(by_resuming, path, model.state_dict(), model)
    with pytest.raises(AttributeError, match='_epoch'):  # of no training, after all is loaded
        by_resuming(model, path)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('load', 'key', 'kind'),
    [
        *((weights.load, 'backbone.stem.weight', kind) for kind in ODD),
        *itertools.product(
            [by_mm, by_resuming],
            ['backbone.stem.weight', 'decode_head.conv_seg.weight'],
            ['int', 'nan', 'text'],
        ),
    ],
)
def test_a_weight_of_another_kind_is_named(path, model, kind, key, load):
    content = dict(model.state_dict())
    content[key] = odd_weights(content[key])[kind]
    save_for(load, path, content, model)
    before = model.backbone.stem.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load(model, path)
    message = str(caught.value)
    assert str(path) in message and key.removeprefix('backbone.') in message, message
    assert torch.equal(before, model.backbone.stem.weight)


def test_beyond_half_precision_is_named(path):
    backbone = build().half()
    content = backbone.state_dict()
    content['stem.weight'] = content['stem.weight'].float() * 0 + 1e5
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r'stem.weight has values beyond the range of .*16'):
        load_checkpoint(backbone, str(path))
    content['stem.weight'] = content['stem.weight'] / 10
    torch.save(content, path)
    load_checkpoint(backbone, str(path))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('decode_head.fpn_bottleneck.bn.running_var', -1.0, 'has negative variances'),
        ('decode_head.fpn_bottleneck.bn.num_batches_tracked', -1, 'no whole number'),
        ('decode_head.fpn_bottleneck.bn.num_batches_tracked', 0.5, 'no whole number'),
        ('decode_head.fpn_bottleneck.bn.num_batches_tracked', True, 'instead of whole numbers'),
    ],
)
def test_statistics_that_cannot_be(path, model, key, value, message):
    content = dict(model.state_dict())
    content[key] = torch.full_like(content[key], value, dtype=torch.tensor(value).dtype)
    for load in (by_mm, weights.load, by_resuming):
        save_for(load, path, content, model)
        with pytest.raises(CheckpointError, match=f'{re.escape(key)} .*{message}'):
            load(model, path)


def test_negative_variance_in_a_backbone(path):
    backbone = build(norm='bn', norm_size=64)
    content = backbone.state_dict()
    key = next(key for key in content if key.endswith('running_var'))
    content[key] = content[key] - 2
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'{key} has negative variances'):
        load_checkpoint(backbone, str(path))


def test_norms_for_images_of_no_size(path):
    backbone = build(norm='bn', norm_size=64)
    shapes = backbone.position_shapes((64, 64))
    content = {
        key: torch.ones(*value.shape[:-2], 0, 0) if key in shapes else value
        for key, value in backbone.state_dict().items()
    }
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='of a wrong shape'):
        load_checkpoint(backbone, str(path))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop('out_norms.1.bias'), 'has out_norms.1.weight and no out_norms.1.bias'),
        (lambda w: w.pop('out_norms.1.weight'), 'has out_norms.1.bias and no out_norms.1.weight'),
        (lambda w: w.update({'module.stem.weight': w['stem.weight']}), 'both the weight'),
        (lambda w: w.update({'_orig_mod.stem.weight': w['stem.weight']}), 'both the weight'),
        (lambda w: w.update({'backbone.stem.weight': w['stem.weight']}), 'two backbones'),
        (lambda w: w.update({7: w['stem.weight']}), 'the key 7 is not a name'),
        (lambda w: w.update({'more.weight': torch.ones(2)}), '1 unexpected: more.weight'),
        (lambda w: w.pop('stem.weight'), '1 missing: stem.weight'),
        (lambda w: w.update({'stem.weight': torch.ones(2)}), 'is (2,) instead of (8, 3, 7, 7)'),
    ],
)
@pytest.mark.parametrize('load', [by_mm, weights.load])
def test_names_are_held_to_the_backbone(path, change, message, load):
    backbone = randomized(build())
    content = dict(backbone.state_dict())
    change(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        load(backbone, path)
    assert message in str(caught.value)


def test_two_names_of_the_release_that_become_one(path):
    content = dict(imagenet_weights(), **{'stages.0.cells.0.gate_logits': torch.zeros(6)})
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='cells.0.skip_weight and .* are both the weight'):
        weights.load(build(arch='cpolynext_t'), path)


INCOMPLETE = [
    (lambda w: w.pop('decode_head.conv_seg.bias'), '1 missing: decode_head.conv_seg.bias'),
    (lambda w: w.update({'neck.weight': torch.ones(2)}), '1 unexpected: neck.weight'),
    (
        lambda w: w.update({'decode_head.conv_seg.bias': torch.ones(3)}),
        'decode_head.conv_seg.bias is (3,) instead of (150,)',
    ),
    (
        lambda w: [w.pop(key) for key in list(w) if 'backbone' not in key],
        'it is a backbone alone and cannot be evaluated',
    ),
    (
        lambda w: [w.pop(key) for key in list(w) if 'out_norms' in key],
        'has no output norms for the stages',
    ),
]


@pytest.mark.parametrize(('change', 'message'), INCOMPLETE)
def test_what_mmengine_warns_about_is_an_error(path, model, change, message):
    """Without a hook in the config: mmengine's load_checkpoint, which mm's apis call."""
    content = dict(model.state_dict())
    change(content)
    torch.save(dict(meta={}, state_dict=content), path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        load_checkpoint(model, str(path))
    assert message in str(caught.value)


@pytest.mark.heavy
@pytest.mark.parametrize(('change', 'message'), INCOMPLETE)
def test_an_average_has_all_weights_of_the_model(path, model, change, message):
    """Of which mmengine exchanges those that are there."""
    content = dict(model.state_dict())
    change(content)
    save_for(by_resuming, path, content, model)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        by_resuming(model, path)
    assert (message if 'conv_seg' in message else 'does not fit') in str(caught.value)


def test_a_whole_file_loads_and_says_so(path, model, monkeypatch):
    printed = []
    monkeypatch.setattr(
        'polynext_mm.backbones.multiscale.say', lambda line, **_: printed.append(line)
    )
    content = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(dict(meta={}, state_dict=content), path)
    loaded = randomized(model, seed=1)
    load_checkpoint(loaded, str(path))
    assert all(torch.equal(value, content[key]) for key, value in loaded.state_dict().items())
    heads = [key for key in content if not key.startswith('backbone.')]
    backbone = len(content) - len(heads)
    assert printed == [
        f'EncoderDecoder heads: loaded {len(heads)} of {len(heads)} tensors from {path}',
        f'PolyNeXt: loaded {backbone} of {backbone} tensors from {path}',
    ]


def test_weights_in_memory_are_left_to_torch(model):
    """What does not come from a file: a state dict of part of the model, not strictly."""
    part = {key: value for key, value in model.state_dict().items() if 'auxiliary' not in key}
    result = model.load_state_dict(part, strict=False)
    assert result.missing_keys and not result.unexpected_keys
