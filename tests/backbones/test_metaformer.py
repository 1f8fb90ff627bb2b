"""The peers: timm's networks with PolyNeXt's arguments, outputs and strict loading."""

import functools
import re
import sys

import huggingface_hub
import pytest
import timm
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from polynext_mm.backbones.metaformer import METAFORMERS
from polynext_mm.weights import CheckpointError
from tests.helpers import zipped
from tests.helpers.tiny import randomized

ARCHS = ('convformer_s18', 'caformer_s18')
WIDTHS = (64, 128, 320, 512)
BLOCKS = 3 + 3 + 9 + 3


def build(arch: str = 'convformer_s18', **settings) -> nn.Module:
    return MODELS.build(dict(dict(type='MetaFormer', arch=arch), **settings))


def on_meta(arch: str = 'convformer_s18', **settings) -> nn.Module:
    with torch.device('meta'):
        return build(arch, **settings)


def image(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@functools.cache
def classifier(arch: str) -> nn.Module:
    """timm's network with weights under which everything matters."""
    return randomized(timm.create_model(arch)).eval()


EACH = pytest.mark.parametrize('arch', ARCHS)


def in_authors_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's weights as in the authors' release, whose 1x1 convolutions are linear."""
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in (
            (r'^stem\.conv', 'downsample_layers.0.conv'),
            (r'^stem\.norm', 'downsample_layers.0.post_norm'),
            (r'^stages\.(\d)\.downsample\.conv', r'downsample_layers.\1.conv'),
            (r'^stages\.(\d)\.downsample\.norm', r'downsample_layers.\1.pre_norm'),
            (r'^stages\.(\d)\.blocks\.', r'stages.\1.'),
            (r'^head\.norm', 'norm'),
            (r'^head\.fc', 'head'),
        ):
            key = re.sub(ours, theirs, key)
        renamed[key] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    return renamed


def pretrained(path) -> dict:
    return dict(type='Pretrained', checkpoint=str(path))


# Building and outputs


@pytest.mark.parametrize('arch', METAFORMERS)
def test_every_arch_builds_with_the_published_widths(arch):
    model = on_meta(arch)
    widths = (96, 192, 384, 576) if '_m' in arch else WIDTHS
    assert (model.out_channels, model.out_strides) == (widths, (4, 8, 16, 32))
    assert not any(name.startswith('head') for name in model.state_dict())


@pytest.mark.parametrize(
    ('settings', 'valid'),
    [
        (dict(arch='convformer_x'), 'convformer_s18, convformer_s36, convformer_m36, caformer_s18'),
        (dict(arch=dict(depths=(1, 1))), 'choose one of convformer_s18'),
        (dict(out_indices=(0, 4)), r'\(0, 1, 2, 3\)'),  # as of PolyNeXt, and all others
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_the_valid_ones(settings, valid):
    with pytest.raises(ValueError, match=valid):
        on_meta(**settings)


def test_weights_are_not_given_by_pretrained():
    """mmseg's segmentors pass it on to their backbone."""
    on_meta(pretrained=None)
    with pytest.raises(ValueError, match="init_cfg=dict.*checkpoint='timm://caformer_s18'"):
        on_meta('caformer_s18', pretrained='caformer.pth')


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match='pip install timm') as caught:
        build()
    assert caught.value.name == 'timm'


@EACH
def test_features_are_timms_in_channels_last_memory(arch):
    x = image(64, 96)
    model = build(arch, out_norm=False).eval()
    model.load_state_dict(classifier(arch).state_dict(), strict=False)
    with torch.no_grad():
        outs = model(x)
        features = classifier(arch).forward_intermediates(x, intermediates_only=True)
    for out, expected in zipped(outs, features):
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('out_norm', [True, False])
def test_any_subset_of_stages(out_norm):
    model = build(out_indices=(1, 3), out_norm=out_norm).eval()
    with torch.no_grad():
        outs = model(image(64, 64))
    assert (model.out_channels, model.out_strides) == ((128, 512), (8, 32))
    assert [tuple(out.shape) for out in outs] == [(1, 128, 8, 8), (1, 512, 2, 2)]
    assert set(model.out_norms) == ({'1', '3'} if out_norm else set())
    if out_norm:
        assert all(out.mean(1).abs().max() < 1e-5 for out in outs)


def test_odd_sizes():
    outs = on_meta()(image(33, 46).to('meta'))
    assert [tuple(out.shape[2:]) for out in outs] == [(8, 11), (4, 6), (2, 3), (1, 2)]


# Training


def train_once(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features and gradients in training mode, with the same paths dropped every time."""
    torch.manual_seed(1)
    outs = model.train()(x)
    sum(out.square().mean() for out in outs).backward()
    return list(outs), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@EACH
def test_checkpointing_changes_nothing_and_computes_blocks_again(arch):
    results, calls = [], []
    for with_cp in (False, True):
        model = randomized(build(arch, with_cp=with_cp, drop_path_rate=0.3, frozen_stages=1))
        model.stages[2].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        results.append(train_once(model, image(32, 32, batch=2)))
    assert len(calls) == 1 + 2
    (plain, plain_grads), (saving, saving_grads) = results
    assert all(torch.equal(a, b) for a, b in zipped(plain, saving))
    assert plain_grads.keys() == saving_grads.keys()
    assert all(torch.equal(plain_grads[name], saving_grads[name]) for name in plain_grads)


@pytest.mark.parametrize('stages', [-1, 0, 2, 4])
def test_frozen_stages(stages):
    model = on_meta(frozen_stages=stages, drop_path_rate=0.5).train()
    frozen = ['stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'][: stages + 1]
    for name, param in model.named_parameters():
        inside = any(name.startswith(part + '.') for part in frozen)
        assert param.requires_grad is not inside, name
    for part in frozen:
        assert not any(module.training for module in model.get_submodule(part).modules())
    assert model.out_norms.training


def test_drop_path_rates_rise_linearly_from_0():
    model = on_meta(drop_path_rate=0.34)
    rates = [
        getattr(block.drop_path1, 'drop_prob', 0.0)
        for stage in model.stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0.34 * i / (BLOCKS - 1) for i in range(BLOCKS)])


@pytest.mark.parametrize(
    ('name', 'depth'),
    [
        ('stem.norm.weight', 0),
        ('stages.0.blocks.0.norm1.weight', 1),
        ('stages.1.downsample.conv.weight', 4),
        ('stages.1.blocks.0.norm1.weight', 4),
        ('stages.3.blocks.2.mlp.fc1.weight', 18),
        ('out_norms.0.bias', 19),
    ],
)
def test_layer_depth(name, depth):
    assert on_meta().get_layer_depth(f'backbone.{name}') == (depth, BLOCKS + 2)


def test_autocast_is_finite():
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        outs = build('caformer_s18')(image(64, 64))
    assert {out.dtype for out in outs} == {torch.float32}
    assert all(out.isfinite().all() for out in outs)


# Weights


def saved(weights: dict[str, Tensor], path) -> None:
    weights = {key: value.contiguous() for key, value in weights.items()}
    if path.suffix == '.safetensors':
        save_file(weights, path)
    else:
        torch.save(weights, path)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """The lines that loading logs."""
    lines = []
    monkeypatch.setattr(
        'polynext_mm.backbones.multiscale.say', lambda text, **_: lines.append(text)
    )
    return lines


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """What timm's file of ConvFormer-S18 holds."""
    return dict(classifier('convformer_s18').state_dict())


def check_loads(model: nn.Module, source, log: list[str]) -> None:
    """Check that ``init_cfg`` loads the classifier's weights, and that the log says so."""
    model.init_weights()
    weights = classifier(model.arch).state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith('out_norms.'):
            assert torch.equal(value, weights[key]), key
    total, norms = len(model.state_dict()), 8 if model.out_norms else 0
    assert log[-1].startswith(
        f'MetaFormer: loaded {total - norms} of {total} tensors from {source}'
    )


@pytest.mark.parametrize(('arch', 'name'), zip(ARCHS, ('model.safetensors', 'pytorch_model.bin')))
def test_timms_files(arch, tmp_path, log, name):
    path = tmp_path / name
    saved(classifier(arch).state_dict(), path)
    check_loads(build(arch, init_cfg=pretrained(path)), path, log)


@EACH
def test_the_files_of_the_authors_release(arch, tmp_path, log):
    path = tmp_path / 'release.pth'
    saved(in_authors_names(classifier(arch).state_dict()), path)
    assert 'stages.0.0.token_mixer.pwconv1.weight' in torch.load(path)
    check_loads(build(arch, init_cfg=pretrained(path), out_norm=False), path, log)
    assert log[0].endswith(
        '; left over in the file: norm.weight, norm.bias, head.fc1, head.norm, head.fc2'
    )


def test_what_is_left_over_or_fresh_is_reported(weights, tmp_path, log):
    saved(weights, tmp_path / 'peer.pth')
    build(init_cfg=pretrained(tmp_path / 'peer.pth'), out_indices=(1,)).init_weights()
    assert log[0].endswith(
        'not in the file, left as initialized: out_norms.1.weight, out_norms.1.bias; '
        'left over in the file: head.norm, head.fc'
    )


@pytest.mark.parametrize('naming', [dict, in_authors_names], ids=['timm', 'authors'])
def test_the_stem_of_a_file_is_adapted_on_request(weights, naming, tmp_path, log):
    path = tmp_path / 'peer.pth'
    saved(naming(weights), path)
    model = build(in_channels=4, adapt_stem=True, init_cfg=pretrained(path))
    model.init_weights()
    expected = timm.models.adapt_input_conv(4, weights['stem.conv.weight'])
    torch.testing.assert_close(model.stem.conv.weight.data, expected)
    assert log[0].endswith('; stem.conv.weight adapted from 3 to 4 channels')
    with pytest.raises(CheckpointError, match='set adapt_stem=True in the backbone'):
        build(in_channels=4, init_cfg=pretrained(path)).init_weights()


def test_a_whole_segmentors_backbone(tmp_path):
    """As mmengine saves it: with output norms, heads and meta."""
    model = randomized(build())
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    content = dict(meta={}, state_dict=weights | {'decode_head.conv_seg.bias': torch.ones(2)})
    torch.save(content, tmp_path / 'segmentor.pth')
    other = build(init_cfg=pretrained(tmp_path / 'segmentor.pth'))
    other.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def without(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize('naming', [dict, in_authors_names], ids=['timm', 'authors'])
@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (
            lambda w: without(w, 'stages.1.downsample.norm.weight'),
            '1 missing: stages.1.downsample.norm.weight',
        ),
        (
            lambda w: w | {'stages.0.blocks.7.norm1.weight': torch.ones(64)},
            '1 unexpected: stages.0.blocks.7.norm1.weight',
        ),
        (
            lambda w: w | {'stages.0.blocks.1.norm1.weight': torch.ones(63)},
            r'1 of a wrong shape: stages.0.blocks.1.norm1.weight is \(63,\) instead of \(64,\)',
        ),
    ],
    ids=['missing', 'unexpected', 'shape'],
)
def test_what_does_not_fit_is_an_error(weights, naming, change, problem):
    with pytest.raises(CheckpointError, match=f'the checkpoint does not fit: {problem}'):
        on_meta().load_state_dict(naming(change(weights)), strict=False)


@pytest.mark.parametrize('naming', [dict, in_authors_names], ids=['timm', 'authors'])
@pytest.mark.parametrize('other', ['caformer_s36', 'convformer_m36'])
def test_a_file_of_another_arch_is_recognized(weights, naming, other):
    with pytest.raises(CheckpointError, match="the file is of arch 'convformer_s18': set arch"):
        on_meta(other).load_state_dict(naming(weights), strict=False)


def test_errors_name_the_file(weights, tmp_path):
    path = tmp_path / 'peer.pth'
    saved(weights, path)
    model = build('caformer_s18', init_cfg=pretrained(path))
    with pytest.raises(CheckpointError, match=f'{re.escape(str(path))} does not fit: '):
        model.init_weights()


def test_a_file_of_something_else(tmp_path):
    torch.save({'conv1.weight': torch.ones(1)}, tmp_path / 'resnet.pth')
    model = build(init_cfg=pretrained(tmp_path / 'resnet.pth'))
    with pytest.raises(CheckpointError, match='no weights of the backbone at all'):
        model.init_weights()


def test_a_backbone_alone_is_no_whole_model(weights, tmp_path):
    saved(weights, tmp_path / 'peer.pth')
    model = nn.Module()
    model.backbone = on_meta()
    with pytest.raises(CheckpointError, match='given as init_cfg of the backbone'):
        load_checkpoint(model, str(tmp_path / 'peer.pth'))


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    torch.save(dict(state_dict=nn.Linear(1, 1)), tmp_path / 'model.pth')
    with pytest.raises(CheckpointError, match='could execute code'):
        build(init_cfg=pretrained(tmp_path / 'model.pth')).init_weights()


# Weights by timm's names


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that puts a network into the cache of an offline hub, as a download would."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

    def put(name: str, network: nn.Module) -> None:
        folder = tmp_path / f'models--timm--{name}'
        (folder / 'snapshots' / '1').mkdir(parents=True)
        (folder / 'refs').mkdir()
        (folder / 'refs' / 'main').write_text('1')
        saved(network.state_dict(), folder / 'snapshots' / '1' / 'model.safetensors')

    return put


@pytest.mark.parametrize('name', ['caformer_s18.sail_in1k', 'convformer_s18'])
def test_weights_by_timms_names(hub, log, name):
    arch = name.partition('.')[0]
    hub(f'{arch}.sail_in1k', classifier(arch))
    check_loads(build(arch, init_cfg=pretrained(f'timm://{name}')), f'timm://{name}', log)


@pytest.mark.parametrize(
    ('name', 'choice'),
    [
        ('convformer_s18.in1k', 'for convformer_s18 there are convformer_s18.sail_in1k, '),
        ('convformer_s19', r'see timm.list_pretrained\(\)'),
    ],
)
def test_a_name_that_timm_does_not_know(name, choice):
    with pytest.raises(CheckpointError, match=f"no weights of the name '{name}': {choice}"):
        build(init_cfg=pretrained(f'timm://{name}')).init_weights()


def test_without_network_the_error_says_where_the_file_is(hub):
    name = 'timm://convformer_s18.sail_in1k'
    with pytest.raises(CheckpointError, match=f'could not fetch {name} ') as caught:
        build(init_cfg=pretrained(name)).init_weights()
    url = huggingface_hub.hf_hub_url('timm/convformer_s18.sail_in1k', 'model.safetensors')
    assert f'Get {url} and' in str(caught.value)
