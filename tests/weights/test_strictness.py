"""What does not fit is an error that names the file and says what to do; the rest is reported."""

import io
import itertools
import re
import shutil

import pytest
import torch
from mmengine.runner import Runner, load_checkpoint

from polynext_mm import weights
from polynext_mm.weights import CheckpointError, names
from tests.helpers.checkpoints import imagenet_weights, is_golden, prefixed, segmentor_file
from tests.helpers.configs import TINY_NETWORK, build_model, config_to_load_into, tiny_config
from tests.helpers.networks import ARCH, build
from tests.helpers.samples import ade20k_scenes


def refusal(path, **backbone) -> str:
    """What loading by init_cfg is refused with; the file must be named."""
    model = build(
        **dict(dict(arch=ARCH), **backbone), init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    with pytest.raises((CheckpointError, FileNotFoundError), match=re.escape(str(path))) as caught:
        model.init_weights()
    return str(caught.value)


def saved_bytes(**options) -> bytes:
    some = dict(itertools.islice(imagenet_weights().items(), 40))
    buffer = io.BytesIO()
    torch.save(some, buffer, **options)
    return buffer.getvalue()


# Files that are none


def test_an_absent_file(path):
    assert 'there is no checkpoint' in refusal(path)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_file_cut_anywhere(path, zipped):
    whole = saved_bytes(_use_new_zipfile_serialization=zipped)
    network = build(out_norm=False)
    for length in (0, 1, 3, 4, 30, 100, 999, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(path)) + '.*(damaged|truncated)'):
            weights.load(network, path)


def test_an_archive_cut_short_is_named_by_mms_loader_too(path):
    whole = saved_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint(build(), str(path))


@pytest.mark.parametrize(
    'content',
    [b'hello world', b'<html>404</html>', b'\x80\x02', b'(', bytes(1000), b'PK\x03\x04nothing'],
)
def test_junk(path, content):
    path.write_bytes(content)
    assert 'Get it again' in refusal(path)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(b'\xff' * 20)
    assert 'damaged' in refusal(path)


@pytest.mark.parametrize(
    'content',
    [
        {},
        {'state_dict': {}},
        {'epoch': 3},
        {'meta': {}},
        {'meta': {}, 'state_dict': None},
        {'meta': {}, 'state_dict': {'step': 3}},
        {1: 2},
    ],
    ids=str,
)
def test_a_file_without_weights(path, content):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'{re.escape(str(path))} holds no weights'):
        weights.read(path)


def test_a_file_that_is_no_dict(path):
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match='holds a list, not a checkpoint'):
        weights.read(path)


# Files of something else


@pytest.mark.parametrize(
    ('arch', 'file_arch'),
    [
        ('cpolynext_t', 'apolynext_t'),
        ('apolynext_t', 'cpolynext_t'),
        ('cpolynext_t', 'cpolynext_s'),
    ],
)
def test_another_arch_is_named(path, arch, file_arch):
    torch.save(imagenet_weights(file_arch), path)
    assert f"the file is of arch '{file_arch}': set arch to that" in refusal(path, arch=arch)


def test_another_number_of_input_channels(path):
    torch.save(imagenet_weights(), path)
    message = refusal(path, in_channels=4)
    assert 'stem.weight is (48, 3, 7, 7) instead of (48, 4, 7, 7)' in message
    remedy = 'adapt_stem=True in the backbone to adapt the stem, or in_channels=3'
    assert f'for images of 3 channels, and in_channels=4: set {remedy}' in message


@pytest.mark.parametrize(
    'key',
    [
        'stem.weight',
        'cells.5.skip_weight',
        'reductions.1.0.weight',
        'cells.11.ops.17.1.weight',
        'cells.0.preprocess1.scale',
    ],
)
def test_a_missing_weight_is_named(path, key):
    torch.save({k: v for k, v in imagenet_weights().items() if k != key}, path)
    ours = dict(names.authors_to_ours(build(arch=ARCH).arch))[key]
    assert f'1 missing: {ours}' in refusal(path)


@pytest.mark.parametrize(
    'key',
    [
        'cells.0.ops.99.weight',
        'adapter.weight',
        'extra_norm.0.weight',
        'stages.9.cells.0.stacks.0.mixer.proj_in.weight',
    ],
)
def test_an_unknown_weight_is_named(path, key):
    torch.save(dict(imagenet_weights(), **{key: torch.ones(2)}), path)
    assert f'1 unexpected: {key}' in refusal(path)


def test_a_wrong_shape_is_named(path):
    torch.save(dict(imagenet_weights(), **{'cells.3.skip_weight': torch.ones(8)}), path)
    assert 'gate_logits is (8,) instead of (6,)' in refusal(path)


def test_many_problems_stay_one_line(path):
    torch.save({k: v for k, v in imagenet_weights().items() if 'ops' not in k}, path)
    message = refusal(path)
    assert re.search(r'\d+ missing: .* and \d+ more', message)
    assert len(message) < 600


def test_weights_of_another_network(path):
    torch.save({'layer1.0.conv1.weight': torch.ones(2, 2), 'fc.bias': torch.ones(2)}, path)
    message = refusal(path)
    assert '2 unexpected: layer1.0.conv1.weight, fc.bias' in message
    assert 'no weights of the backbone at all' in message


@pytest.mark.heavy
def test_heads_alone(path, config):
    content = segmentor_file(config)
    content['state_dict'] = {k: v for k, v in content['state_dict'].items() if 'head' in k}
    torch.save(content, path)
    assert 'no weights of the backbone at all' in refusal(path)
    config.load_from = str(path)
    with pytest.raises(CheckpointError, match='no weights of the backbone at all'):
        Runner.from_cfg(config).train()


@pytest.mark.parametrize(
    ('file', 'network', 'setting'),
    [
        ('cpolynext_t_bn', dict(), "norm='bn'"),
        ('cpolynext_t', dict(norm='bn'), "norm='ln'"),
        ('apolynext_t_bn', dict(norm='bn'), "arch 'apolynext_t'"),
        ('cpolynext_lr', dict(), "arch 'cpolynext_lr'"),
    ],
)
def test_a_file_of_another_kind_of_network_says_what_to_set(path, file, network, setting):
    torch.save(dict(ema=prefixed('module.', imagenet_weights(file))), path)
    assert setting in refusal(path, **network)


# What may be missing or left over is reported


def test_the_report_of_an_imagenet_file(path):
    torch.save(imagenet_weights(), path)
    backbone = build(arch=ARCH, out_indices=(1, 3))
    report = weights.load(backbone, path)
    total = len(backbone.state_dict())
    assert report.startswith(f'PolyNeXt: loaded {total - 4} of {total} tensors from {path}; ')
    fresh, left = re.search(
        'left as initialized: (.*); left over in the file: (.*)', report
    ).groups()
    assert fresh == ', '.join(
        f'out_norms.{i}.{kind}' for i in (1, 3) for kind in ('weight', 'bias')
    )
    assert left == 'head.norm, head.proj, head.fc'


def test_a_backbone_alone_leaves_heads_and_unasked_norms(path, config):
    torch.save(segmentor_file(config), path)
    report = weights.load(build(arch=ARCH, out_indices=(0,)), path)
    left = re.search('left over in the file: (.*)', report)[1].split(', ')
    assert {'out_norms.1', 'out_norms.2', 'out_norms.3'} < set(left)
    assert 'decode_head.conv_seg' in left and 'auxiliary_head.convs' in left
    assert 'out_norms.0' not in left


# Heads


@pytest.fixture
def twenty_classes(config):
    from mmseg.datasets import ADE20KDataset

    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = 20
    classes = ADE20KDataset.METAINFO['classes'][:20]
    config.train_dataloader.dataset.metainfo = dict(classes=classes)
    config.test_dataloader.dataset.metainfo = dict(classes=classes)
    return config


@pytest.mark.heavy
def test_a_head_of_other_classes_is_an_error_that_names_the_option(path, twenty_classes):
    torch.save(segmentor_file(tiny_config('', '')), path)
    twenty_classes.load_from = str(path)
    with pytest.raises(CheckpointError, match='reset_mismatched_heads=True') as caught:
        Runner.from_cfg(twenty_classes).train()
    message = str(caught.value)
    assert 'decode_head.conv_seg.weight is (150, 16, 1, 1) instead of (20, 16, 1, 1)' in message
    assert message.startswith(f'{path} does not fit')


@pytest.mark.heavy
def test_other_classes_by_the_option(path, twenty_classes):
    content = segmentor_file(tiny_config('', ''))
    torch.save(content, path)
    twenty_classes.load_from = str(path)
    twenty_classes.custom_hooks[0].reset_mismatched_heads = True
    runner = Runner.from_cfg(twenty_classes)
    runner.train()
    heads = runner.model.state_dict()
    assert heads['decode_head.conv_seg.weight'].shape[0] == 20
    assert heads['decode_head.conv_seg.weight'].abs().mean() < 0.05  # of mmseg's initialization
    kept = 'decode_head.psp_modules.0.1.conv.weight'
    assert torch.allclose(heads[kept], content['state_dict'][kept], atol=1e-4)


@pytest.mark.heavy
def test_the_option_does_not_let_an_evaluation_pass(path, twenty_classes):
    torch.save(segmentor_file(tiny_config('', '')), path)
    twenty_classes.load_from = str(path)
    twenty_classes.custom_hooks[0].reset_mismatched_heads = True
    with pytest.raises(CheckpointError, match='conv_seg'):
        Runner.from_cfg(twenty_classes).load_or_resume()


@pytest.mark.heavy
@pytest.mark.parametrize(('in_file', 'in_model'), [(True, False), (False, True)])
def test_output_norms_must_agree_in_evaluation(path, config, in_file, in_model):
    content = segmentor_file(config)
    if not in_file:
        content['state_dict'] = {k: v for k, v in content['state_dict'].items() if 'extra' not in k}
    torch.save(content, path)
    config.load_from = str(path)
    config.model.backbone.out_norm = in_model
    with pytest.raises(CheckpointError, match=f'out_norm={in_file}'):
        Runner.from_cfg(config).load_or_resume()


@pytest.mark.heavy
@pytest.mark.parametrize(
    'part', ['decode_head.fpn_convs.1.conv.weight', 'auxiliary_head.conv_seg.bias']
)
def test_heads_missing_in_part(path, config, part):
    content = segmentor_file(config)
    del content['state_dict'][part]
    torch.save(content, path)
    config.load_from = str(path)
    with pytest.raises(CheckpointError, match=f'1 missing: {re.escape(part)}'):
        Runner.from_cfg(config).train()


def test_load_refuses_a_misfit_and_leaves_the_model_alone(path):
    torch.save(imagenet_weights('apolynext_t'), path)
    backbone = build(arch=ARCH)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError):
        weights.load(backbone, path)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


# init_cfg is not fetched for nothing


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The work dir of a run of one iteration."""
    work_dir = tmp_path_factory.mktemp('trained')
    saving = {'default_hooks.checkpoint.interval': 1}
    config = config_to_load_into(ade20k_scenes(), work_dir, **TINY_NETWORK, **saving)
    Runner.from_cfg(config).train()
    return work_dir


@pytest.mark.heavy
@pytest.mark.parametrize('how', ['load_from', 'resume from', 'resume the latest'])
def test_a_checkpoint_that_brings_the_backbone_spares_init_cfg(config, trained, tmp_path, how):
    work_dir = shutil.copytree(trained, tmp_path / 'again')
    config.merge_from_dict(TINY_NETWORK)
    config.work_dir, checkpoint = str(work_dir), work_dir / 'iter_1.pth'
    config.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='http://127.0.0.1:9/weights.pt'
    )
    config.resume = how != 'load_from'
    config.load_from = None if how == 'resume the latest' else str(checkpoint)
    config.train_cfg.max_iters = 2
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.iter == 2


@pytest.mark.heavy
def test_resuming_where_there_is_nothing_fetches_init_cfg(path, config):
    torch.save(imagenet_weights(), path)
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    config.model.backbone.out_norm = False
    config.resume = True
    runner = Runner.from_cfg(config)
    runner.train()
    assert is_golden(runner.model.backbone)


def test_a_segmentor_loads_a_backbone_alone(path, config):
    torch.save(imagenet_weights(), path)
    model = build_model(config)
    before = model.decode_head.conv_seg.weight.clone()
    report = weights.load(model, path)
    assert report.startswith('EncoderDecoder heads: loaded 0 of ')
    assert torch.equal(model.backbone.stem.weight, imagenet_weights()['stem.weight'])
    assert torch.equal(model.decode_head.conv_seg.weight, before)
