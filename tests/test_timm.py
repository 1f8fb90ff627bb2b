"""PolyNeXt as a model of timm's: what timm's own tests ask of a model, and strict loading."""

import sys

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import polynext_mm.timm  # noqa: F401 - registers
from golden import Golden, image
from helpers import ARCH, MM_PACKAGES, imagenet_weights, python, python_without
from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED, CheckpointError

IMAGENET_ARCHS = [arch for arch in ARCHS if arch != 'cpolynext_lr']

SMALL = ('cpolynext_t', 'apolynext_t')
EACH = pytest.mark.parametrize('arch', SMALL)


def create(arch: str = ARCH, **options) -> nn.Module:
    return timm.create_model(arch, **options)


def batch(size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path) -> str:
    """What the authors publish."""
    path = tmp_path / f'{ARCH}.pt'
    torch.save(imagenet_weights(), path)
    return str(path)


def pretrained(file: str, **options) -> nn.Module:
    return create(pretrained=True, pretrained_cfg_overlay=dict(file=file), **options)


# What timm knows of the archs


def test_every_arch_is_registered_with_its_published_file():
    assert set(timm.list_models('*polynext*')) == set(IMAGENET_ARCHS)
    for arch in IMAGENET_ARCHS:
        config = timm.get_pretrained_cfg(arch)
        assert (config.url, config.tag) == (PUBLISHED[arch].url, 'in1k')
        assert f'{PUBLISHED[arch].figure} percent' in config.description
        assert f'{arch}.in1k' in timm.list_pretrained()


@pytest.mark.parametrize('arch', IMAGENET_ARCHS)
def test_the_default_cfg_names_what_is_there(arch):
    with torch.device('meta'):
        model = create(arch).eval()
        feature = model.forward_features(torch.empty(1, *model.default_cfg['input_size']))
    assert tuple(feature.shape) == (1, model.num_features, *model.default_cfg['pool_size'])
    weights = model.state_dict()
    for part in ('classifier', 'first_conv'):
        assert model.default_cfg[part] + '.weight' in weights
    assert model.get_classifier() is model.get_submodule(model.default_cfg['classifier'])
    assert model.feature_info == [
        dict(num_chs=width, reduction=stride, module=f'stages.{i}')
        for i, (width, stride) in enumerate(zip(ARCHS[arch].widths, ARCHS[arch].strides))
    ]


def test_images_are_prepared_as_by_the_release():
    transform = str(create_transform(**resolve_model_data_config(create())))
    assert 'Resize(size=232, interpolation=bicubic' in transform
    assert 'CenterCrop(size=(224, 224))' in transform
    assert (
        'mean=tensor([0.4850, 0.4560, 0.4060]), std=tensor([0.2290, 0.2240, 0.2250])' in transform
    )


# Forward and backward


@EACH
def test_logits_are_the_head_of_the_features(arch):
    model = create(arch, num_classes=42).eval()
    feature = model.forward_features(batch())
    hidden = model.forward_head(feature, pre_logits=True)
    assert feature.shape == (2, model.num_features, 2, 2)
    assert hidden.shape == (2, model.head_hidden_size)
    logits = model(batch())
    assert logits.shape == (2, 42)
    assert torch.equal(logits, model.forward_head(feature))
    assert torch.equal(logits, model.get_classifier()(hidden))


def test_without_classifier_and_without_pooling():
    model = create().eval()
    hidden = model.forward_head(model.forward_features(batch()), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(batch()), hidden)
    model.reset_classifier(0, '')
    unpooled = model(batch())
    assert unpooled.shape == (2, model.head_hidden_size, 2, 2)
    torch.testing.assert_close(unpooled.mean((2, 3)), hidden)
    model.reset_classifier(7, 'avg')
    assert model.num_classes == 7 and model(batch()).shape == (2, 7)


@EACH
def test_every_parameter_has_a_gradient(arch):
    model = create(arch, num_classes=42, drop_rate=0.1, in_chans=4).train()
    logits = model(batch(channels=4))
    logits.mean().backward()
    assert logits.isfinite().all()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []


def test_gradient_checkpointing_computes_cells_again_and_changes_nothing():
    model, gradients, calls = create(drop_path_rate=0.2).train(), [], []
    model.cells()[3].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(batch()).square().mean().backward()
        gradients.append([param.grad.clone() for param in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_options_have_effects():
    model = create(drop_path_rate=0.3, drop_rate=0.2, num_classes=5)
    assert model.cells()[-1].drop_path_rate == pytest.approx(0.3)
    assert model.head.dropout.p == 0.2
    assert model.head.fc.out_features == model.num_classes == 5


@pytest.mark.parametrize(
    ('options', 'error', 'valid'),
    [
        (dict(global_pool='max'), ValueError, r"\('avg', ''\)"),
        (dict(global_pool=''), ValueError, "global_pool='avg', or num_classes=0"),
        (dict(drop_path_rate=2.0), ValueError, r'\[0, 1\]'),
        (dict(drop_block_rate=0.1), TypeError, 'drop_block_rate'),
    ],
    ids=str,
)
def test_wrong_options(options, error, valid):
    with pytest.raises(error, match=valid):
        create(**options)


# Features


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 3), (-2,), (0,)])
def test_features_only(indices):
    model = create(features_only=True, out_indices=indices).eval()
    stages = [index % 4 for index in indices]
    assert model.feature_info.channels() == [ARCHS[ARCH].widths[i] for i in stages]
    assert model.feature_info.reduction() == [ARCHS[ARCH].strides[i] for i in stages]
    outs = model(batch())
    assert [tuple(out.shape) for out in outs] == [
        (2, ARCHS[ARCH].widths[i], 64 // ARCHS[ARCH].strides[i], 64 // ARCHS[ARCH].strides[i])
        for i in stages
    ]
    sum(out.mean() for out in outs).backward()
    assert all(param.grad is not None for param in model.parameters())  # nothing idles under DDP


def test_intermediates():
    model = create().eval()
    last, features = model.forward_intermediates(batch())
    assert len(features) == 4 and torch.equal(last, features[3])
    assert torch.equal(last, model.forward_features(batch()))
    some = model.forward_intermediates(batch(), indices=[0, -3], intermediates_only=True)
    assert len(some) == 2 and torch.equal(some[1], features[1])
    second, _ = model.forward_intermediates(batch(), indices=[1], stop_early=True)
    assert torch.equal(second, features[1])
    with pytest.raises(ValueError, match="must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(batch(), output_fmt='NHWC')
    with pytest.raises(ValueError, match='norm must be False'):
        model.forward_intermediates(batch(), norm=True)


def test_layer_wise_learning_rates():
    model = create()
    groups = create_optimizer_v2(model, 'adamw', lr=1.0, layer_decay=0.9).param_groups
    scale = {id(param): group['lr_scale'] for group in groups for param in group['params']}
    for name, exponent in (
        ('head.fc.weight', 0),
        ('head.norm.weight', 1),
        ('stages.3.cells.1.scale0', 1),
        ('stages.0.cells.0.stacks.0.mixer.norm.weight', 12),
    ):
        assert scale[id(model.get_parameter(name))] == pytest.approx(0.9**exponent), name


# Weights


def logits_are_golden(model: nn.Module) -> bool:
    size = (64, 64)
    expected = Golden(ARCH).logits(size)
    with torch.no_grad():
        off = (model.eval()(image(size)) - expected).abs().max()
    return off <= 1e-3 * expected.abs().max()


def test_pretrained_is_the_authors_file(monkeypatch, tmp_path):
    """Where torch.hub keeps what it downloads."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    torch.save(imagenet_weights(), tmp_path / 'checkpoints' / f'{ARCH}.pt')
    assert logits_are_golden(create(pretrained=True))


def test_files_in_the_authors_names_and_ours(file, tmp_path):
    model = pretrained(file)
    assert logits_are_golden(model)
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    assert logits_are_golden(pretrained(str(tmp_path / 'ours.pth')))
    assert logits_are_golden(create(checkpoint_path=file))  # and with it timm's --checkpoint
    assert logits_are_golden(create(checkpoint_path=tmp_path / 'ours.pth'))


def test_pretrained_for_other_images_classes_and_features(file):
    model = pretrained(file, in_chans=1, num_classes=5)
    weights = imagenet_weights()
    torch.testing.assert_close(model.stem.weight, weights['stem.weight'].sum(1, keepdim=True))
    assert torch.equal(model.head.norm.weight, weights['norm.weight'])
    assert model.head.fc.weight.shape == (5, 576)
    features = pretrained(file, features_only=True)
    assert torch.equal(features.model.stem.weight, weights['stem.weight'])


@pytest.mark.parametrize('options', [{}, dict(num_classes=5), dict(features_only=True)], ids=str)
@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda w: w.pop('cells.3.skip_weight'), '1 missing: stages.1.cells.1.gate_logits'),
        (lambda w: w.update(stray=torch.ones(1)), '1 unexpected: stray'),
        (lambda w: w.update({'norm.weight': torch.ones(3)}), r'head.norm.weight is \(3,\)'),
    ],
    ids=['missing', 'unexpected', 'shape'],
)
def test_what_does_not_fit_is_an_error(tmp_path, options, change, problem):
    weights = dict(imagenet_weights())
    change(weights)
    torch.save(weights, tmp_path / 'file.pt')
    with pytest.raises(CheckpointError, match=problem):
        pretrained(str(tmp_path / 'file.pt'), **options)


def test_another_archs_file_is_recognized(file):
    with pytest.raises(CheckpointError, match="the file is of arch 'cpolynext_t'"):
        timm.create_model('apolynext_t', pretrained=True, pretrained_cfg_overlay=dict(file=file))


# Alone


def test_torch_and_timm_are_enough():
    program = """
    import polynext_mm.timm, timm
    print(timm.create_model('cpolynext_t', num_classes=3).get_classifier().out_features)
    """
    assert python_without(MM_PACKAGES, program) == '3\n'


@pytest.mark.slow
def test_scripts_on_top_of_timm_know_the_archs(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm\nprint(timm.is_model(sys.argv[1]))')
    assert python('-m', 'polynext_mm', 'timm', script, 'apolynext_b') == 'True\n'
    assert python('-m', 'polynext_mm', 'run', script, 'apolynext_b') == 'False\n'


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    monkeypatch.delitem(sys.modules, 'polynext_mm.timm')
    with pytest.raises(ImportError, match='pip install timm'):
        import polynext_mm.timm  # noqa: F401
