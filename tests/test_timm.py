"""PolyNeXt as a model of timm's: what timm's own tests ask of a model, and strict loading."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import polynext_mm.timm  # noqa: F401 - registers
from polynext_mm.nn import ARCHS
from polynext_mm.weights import PUBLISHED, CheckpointError, downloads
from tests.golden import Golden, image
from tests.helpers import zipped
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.networks import ARCH
from tests.helpers.programs import MM_PACKAGES, python, python_without

POLYNOMIAL = ('cpolynext_t_bn', 'cpolynext_s_bn', 'apolynext_t_bn')
# The files of the release by timm's names of weights; the first of a network is its default.
FILES = {
    **{f'{arch}.in1k': arch for arch in ARCHS if arch != 'cpolynext_lr'},
    **{f'{name}.in1k': name for name in POLYNOMIAL},
    'cpolynext_lr.cifar10': 'cpolynext_lr_cifar10',
    'cpolynext_lr.svhn': 'cpolynext_lr_svhn',
    'cpolynext_lr.tiny_imagenet': 'cpolynext_lr_tiny_imagenet',
}
OF_EACH_KIND = pytest.mark.parametrize('name', ('cpolynext_t', 'cpolynext_lr', 'apolynext_t_bn'))


def arch_of(name: str):
    return ARCHS[name.removesuffix('_bn')]


# Fully polynomial networks without training are finite in training alone: it uses the batch's own
# statistics. So all networks are in training mode here, where nothing says otherwise.


def create(name: str = ARCH, **options) -> nn.Module:
    return timm.create_model(name, **options)


def batch(size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def released(name: str = ARCH, classes: int | None = None) -> dict[str, Tensor]:
    """Return what the authors publish, by default with as many classes as the golden numbers."""
    weights = dict(imagenet_weights(name))
    if classes is not None:
        for key in ('head.3.weight', 'head.3.bias'):
            weights[key] = torch.ones(classes, *weights[key].shape[1:])
    return weights


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / f'{ARCH}.pt'
    torch.save(released(), path)
    return str(path)


def pretrained(file: str, name: str = ARCH, **options) -> nn.Module:
    return create(name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **options)


# What timm knows of the networks


def test_every_network_is_registered_with_its_published_files():
    assert {name.partition('.')[0] for name in FILES} == {*ARCHS, *POLYNOMIAL}
    assert set(timm.list_models('*polynext*')) == {*ARCHS, *POLYNOMIAL}
    assert set(timm.list_pretrained('*polynext*')) == set(FILES)
    classifiers = {name for name, file in PUBLISHED.items() if file.holds != 'ade20k'}
    assert set(FILES.values()) == classifiers
    for name, file in FILES.items():
        config = timm.get_pretrained_cfg(name)
        assert (config.url, config.tag) == (PUBLISHED[file].url, name.partition('.')[2])
        assert f'{PUBLISHED[file].figure} percent' in config.description
    assert timm.get_pretrained_cfg('cpolynext_lr').tag == 'cifar10'


@pytest.mark.parametrize(
    'name',
    ('cpolynext_t.in1k', 'apolynext_t_bn.in1k', 'cpolynext_lr.svhn', 'cpolynext_lr.tiny_imagenet'),
)
def test_the_default_cfg_names_what_is_there(name):
    arch = arch_of(name.partition('.')[0])
    with torch.device('meta'):
        model = create(name).eval()
        config = model.default_cfg
        feature = model.forward_features(torch.empty(1, *config['input_size']))
        if model.norm == 'ln':  # resizing the norms of the others takes long here
            smallest = model.forward_features(torch.empty(1, *config['min_input_size']))
            assert tuple(smallest.shape) == (1, model.num_features, 1, 1)
    assert tuple(feature.shape) == (1, model.num_features, *config['pool_size'])
    weights = model.state_dict()
    for part in ('classifier', 'first_conv'):
        assert config[part] + '.weight' in weights
    assert model.get_classifier() is model.get_submodule(config['classifier'])
    assert model.get_classifier().out_features == config['num_classes'] == model.num_classes
    assert model.norm == ('bn' if '_bn' in name else 'ln')
    assert model.norm_size == (config['input_size'][1:] if '_bn' in name else None)
    assert model.feature_info == [
        dict(num_chs=width, reduction=stride, module=f'outs.{i}')
        for i, (width, stride) in enumerate(zip(arch.widths, arch.strides))
    ]


@pytest.mark.parametrize(
    ('name', 'resize', 'size', 'classes'),
    [
        ('cpolynext_t', 232, 224, 1000),
        ('apolynext_t_bn', 232, 224, 1000),
        ('cpolynext_lr.cifar10', 32, 32, 10),
        ('cpolynext_lr.svhn', 32, 32, 10),
        ('cpolynext_lr.tiny_imagenet', 64, 64, 200),
    ],
)
def test_images_are_prepared_as_by_the_release(name, resize, size, classes):
    config = resolve_model_data_config(create(name))
    transform = str(create_transform(**config))
    assert f'Resize(size={resize}, interpolation=bicubic' in transform
    assert f'CenterCrop(size=({size}, {size}))' in transform
    if 'cpolynext_lr' in name:
        assert config['mean'] == (0.49139968, 0.48215827, 0.44653124)
        assert config['std'] == (0.24703233, 0.24348505, 0.26158768)
    else:
        assert config['mean'] == (0.485, 0.456, 0.406)
        assert config['std'] == (0.229, 0.224, 0.225)
    assert timm.get_pretrained_cfg(name).num_classes == classes


# Forward and backward


@OF_EACH_KIND
def test_logits_are_the_head_of_the_features(name):
    model, side = create(name, num_classes=42), 64 // arch_of(name).strides[-1]
    feature = model.forward_features(batch())
    hidden = model.forward_head(feature, pre_logits=True)
    assert feature.shape == (2, model.num_features, side, side)
    assert hidden.shape == (2, model.head_hidden_size)
    logits = model(batch())
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert torch.equal(logits, model.forward_head(feature))
    assert torch.equal(logits, model.get_classifier()(hidden))


@OF_EACH_KIND
def test_without_classifier_and_without_pooling(name):
    model, side = create(name), 64 // arch_of(name).strides[-1]
    hidden = model.forward_head(model.forward_features(batch()), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(batch()), hidden)
    model.reset_classifier(0, '')
    unpooled = model(batch())
    assert unpooled.shape == (2, model.head_hidden_size, side, side)
    torch.testing.assert_close(unpooled.mean((2, 3)), hidden)
    model.reset_classifier(7, 'avg')
    assert model.num_classes == 7 and model(batch()).shape == (2, 7)


def every_parameter_has_a_gradient(model: nn.Module, images: Tensor) -> bool:
    logits = model.train()(images)
    logits.mean().backward()
    assert logits.isfinite().all()
    return all(param.grad is not None for param in model.parameters())


@OF_EACH_KIND
def test_every_parameter_has_a_gradient(name):
    model = create(name, num_classes=42, drop_rate=0.1, in_chans=4)
    assert every_parameter_has_a_gradient(model, batch(channels=4))


def test_every_arch_is_fully_polynomial_on_request():
    model = create('cpolynext_lr', norm='bn', norm_size=32)
    assert model.norm_size == (32, 32) and model.head.norm.running_mean.shape == (8, 8)
    assert every_parameter_has_a_gradient(model, batch(32))


@OF_EACH_KIND
def test_gradient_checkpointing_computes_cells_again_and_changes_nothing(name):
    model, gradients, calls = create(name, drop_path_rate=0.2).train(), [], []
    model.cells()[3].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(batch()).square().mean().backward()
        gradients.append([param.grad.clone() for param in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zipped(*gradients))
    counts = [n for key, n in model.named_buffers() if key.endswith('num_batches_tracked')]
    assert all(n == 2 for n in counts)  # once for each batch


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
        (dict(output_stride=16), ValueError, 'must be 32, got 16: PolyNeXt has no dilated stages'),
        (dict(features_only=True, feature_cls='dict'), ValueError, "'hook' or 'fx', got 'dict'"),
        (dict(norm='gn'), ValueError, r"\('ln', 'bn'\)"),
        (dict(norm_size=64), ValueError, "are for norm='bn'"),
        (dict(norm='bn', norm_size='64'), ValueError, 'positive integer or two'),
    ],
    ids=str,
)
def test_wrong_options(options, error, valid):
    with pytest.raises(error, match=valid):
        create(**options)


def test_a_name_with_bn_is_no_network_with_ln():
    with pytest.raises(ValueError, match="norm='bn', got norm='ln': create cpolynext_t instead"):
        create('cpolynext_t_bn', norm='ln')
    with torch.device('meta'):
        assert create('cpolynext_t_bn', norm='bn').norm == 'bn'


# Features


@pytest.mark.parametrize(
    ('name', 'indices'),
    [
        (ARCH, None),
        (ARCH, (1, 3)),
        ('cpolynext_lr', (0, 2)),
        ('apolynext_t_bn', (-2,)),
    ],
)
def test_features_only(name, indices):
    arch = arch_of(name)
    model = create(name, features_only=True, out_indices=indices)
    stages = range(len(arch.widths))
    if indices is not None:
        stages = [stages[index] for index in indices]
    assert model.feature_info.channels() == [arch.widths[i] for i in stages]
    assert model.feature_info.reduction() == [arch.strides[i] for i in stages]
    outs = model(batch())
    assert [tuple(out.shape) for out in outs] == [
        (2, arch.widths[i], 64 // arch.strides[i], 64 // arch.strides[i]) for i in stages
    ]
    assert all(out.isfinite().all() for out in outs)
    sum(out.mean() for out in outs).backward()
    assert all(param.grad is not None for param in model.parameters())  # nothing idles under DDP


@pytest.mark.parametrize(
    ('name', 'feature_cls'),
    [*((ARCH, kind) for kind in ('list', 'getter', 'hook', 'fx')), ('cpolynext_lr', 'fx')],
)
def test_every_class_of_features_gives_the_same(name, feature_cls):
    model = create(name, features_only=True)
    indices = (0, len(arch_of(name).widths) - 1)
    other = create(name, features_only=True, feature_cls=feature_cls, out_indices=indices)
    body = {'hook': 'body', 'fx': 'graph_module'}.get(feature_cls, 'model')
    given = model.model.state_dict()
    left = other.get_submodule(body).load_state_dict(given, strict=False)
    assert not left.unexpected_keys and all('head' in key for key in left.missing_keys)
    assert other.feature_info.channels() == [arch_of(name).widths[i] for i in indices]
    features = model.eval()(batch())
    for index, out in zipped(indices, other.eval()(batch())):
        assert torch.equal(out, features[index])


def test_features_of_any_layer_are_traced():
    model = create().eval()
    extract = timm.models.create_feature_extractor(model, {'outs.1': 'map', 'head': 'logits'})
    found = extract(batch())
    assert torch.equal(found['logits'], model(batch()))
    assert torch.equal(found['map'], model.forward_intermediates(batch())[1][1])


def test_what_scripts_ask_of_any_network():
    """As segmentation_models.pytorch does, and scripts that save memory."""
    model = create(features_only=True, output_stride=32).train()
    calls = []
    model.model.cells()[3].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    sum(out.mean() for out in model(batch())).backward()
    assert len(calls) == 2


@OF_EACH_KIND
def test_intermediates(name):
    model, stages = create(name), len(arch_of(name).widths)
    last, features = model.forward_intermediates(batch())
    assert len(features) == stages and torch.equal(last, features[-1])
    assert torch.equal(last, model.forward_features(batch()))
    some = model.forward_intermediates(batch(), indices=[0, 1 - stages], intermediates_only=True)
    assert len(some) == 2 and torch.equal(some[1], features[1])
    second, _ = model.forward_intermediates(batch(), indices=[1], stop_early=True)
    assert torch.equal(second, features[1])
    with pytest.raises(ValueError, match="must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(batch(), output_fmt='NHWC')
    with pytest.raises(ValueError, match='norm must be False'):
        model.forward_intermediates(batch(), norm=True)


@pytest.mark.parametrize(
    ('name', 'exponents'),
    [
        (
            'cpolynext_t',
            {
                'head.fc.weight': 0,
                'head.norm.weight': 1,
                'stages.3.cells.1.scale0': 1,
                'stages.0.cells.0.stacks.0.mixer.norm.weight': 12,
            },
        ),
        ('cpolynext_lr', {'head.proj.weight': 1, 'stages.0.cells.0.scale0': 8}),
        (
            'apolynext_t_bn',
            {'head.norm.position_weight': 1, 'stages.0.cells.0.norm.position_weight': 12},
        ),
    ],
)
def test_layer_wise_learning_rates(name, exponents):
    model = create(name)
    groups = create_optimizer_v2(model, 'adamw', lr=1.0, layer_decay=0.9).param_groups
    scale = {id(param): group['lr_scale'] for group in groups for param in group['params']}
    for key, exponent in exponents.items():
        assert scale[id(model.get_parameter(key))] == pytest.approx(0.9**exponent), key


@OF_EACH_KIND
def test_norms_do_not_decay(name):
    model = create(name)
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05).param_groups
    decay = {id(param): group['weight_decay'] for group in groups for param in group['params']}
    for key, param in model.named_parameters():
        exempt = 'norm.' in key or param.ndim < 2
        assert decay[id(param)] == (0 if exempt else 0.05), key


# Weights


def is_golden(model: nn.Module, name: str = ARCH) -> bool:
    """Return whether a classifier computes the golden features and logits."""
    numbers, model = Golden(name), model.eval()
    for size, case in numbers.cases.items():
        with torch.no_grad():
            last, features = model.forward_intermediates(image(size, case.get('batch', 1)))
            logits = model.forward_head(last)
        for stage, feature in enumerate(features):
            index, value, absmean = numbers.values(size, stage)
            if not (feature.reshape(-1)[index] - value).abs().max() <= 1e-3 * absmean:
                return False
        # of fully polynomial networks, the golden numbers are features alone
        expected = head_with_batch_norm(last, name) if '_bn' in name else numbers.logits(size)
        if not (logits - expected).abs().max() <= 1e-3 * expected.abs().max():
            return False
    return True


def head_with_batch_norm(feature: Tensor, name: str) -> Tensor:
    """Return the logits of the released classifier of a fully polynomial network."""
    w = imagenet_weights(name)
    x = (feature - w['norm.running_mean']) / (w['norm.running_var'] + 1e-5).sqrt()
    x = x * w['norm.gamma_hw'] * w['norm.gamma_c'][:, None, None]
    left, right = nn.functional.conv2d(x, w['proj.weight']).chunk(2, 1)
    hidden = (left + left * right).mean((2, 3))
    return hidden @ w['head.3.weight'].T + w['head.3.bias']


@pytest.mark.parametrize(
    ('name', 'network'),
    [
        ('cpolynext_t', 'cpolynext_t'),
        ('apolynext_t_bn', 'apolynext_t_bn'),
        ('cpolynext_lr', 'cpolynext_lr'),
        ('cpolynext_lr.svhn', 'cpolynext_lr'),
    ],
)
def test_pretrained_is_the_authors_file(monkeypatch, tmp_path, name, network):
    """Where torch.hub keeps what it downloads."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    weights = FILES.get(name) or FILES[f'{name}.{timm.get_pretrained_cfg(name).tag}']
    # the file that mm's loader downloads, so that there is one
    torch.save(released(network), downloads.cached_path(PUBLISHED[weights].url))
    assert is_golden(create(name, pretrained=True), network)


def test_pretrained_offline_says_where_the_file_goes(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    with pytest.raises(CheckpointError, match='no network.*Put the file at') as caught:
        timm.create_model('cpolynext_t', pretrained=True)
    assert str(downloads.cached_path(PUBLISHED['cpolynext_t'].url)) in str(caught.value)


def test_pretrained_on_tiny_imagenet(tmp_path):
    file = str(tmp_path / 'cpolynext_lr_tiny_imagenet.pt')
    torch.save(released('cpolynext_lr', classes=200), file)
    model = pretrained(file, 'cpolynext_lr.tiny_imagenet')
    assert model.num_classes == 200 and model.head.fc.weight.eq(1).all()


@OF_EACH_KIND
def test_files_in_the_authors_names_and_ours(tmp_path, name):
    theirs, ours = str(tmp_path / 'theirs.pt'), str(tmp_path / 'ours.pth')
    torch.save(released(name), theirs)
    model = pretrained(theirs, name)
    assert is_golden(model, name)
    torch.save(model.state_dict(), ours)
    assert is_golden(pretrained(ours, name), name)
    assert is_golden(create(name, checkpoint_path=theirs), name)  # and with it timm's --checkpoint
    assert is_golden(create(name, checkpoint_path=ours), name)


@OF_EACH_KIND
def test_pretrained_for_other_images_classes_and_features(tmp_path, name):
    file, weights = str(tmp_path / 'file.pt'), released(name)
    torch.save(weights, file)
    model = pretrained(file, name, in_chans=1, num_classes=5)
    torch.testing.assert_close(model.stem.weight, weights['stem.weight'].sum(1, keepdim=True))
    assert torch.equal(model.head.proj.weight, weights['proj.weight'].flatten(1))
    assert model.head.fc.weight.shape == (5, 2 * model.num_features)
    features = pretrained(file, name, features_only=True)
    assert torch.equal(features.model.stem.weight, weights['stem.weight'])


@pytest.mark.parametrize(
    ('change', 'problem', 'options'),
    [
        (lambda w: w.pop('cells.3.skip_weight'), '1 missing: stages.1.cells.1.gate_logits', {}),
        (lambda w: w.update(stray=torch.ones(1)), '1 unexpected: stray', dict(num_classes=5)),
        (
            lambda w: w.update({'norm.weight': torch.ones(3)}),
            r'head.norm.weight is \(3,\)',
            dict(features_only=True),
        ),
    ],
    ids=['missing', 'unexpected', 'shape'],
)
def test_what_does_not_fit_is_an_error(tmp_path, options, change, problem):
    weights = dict(imagenet_weights())
    change(weights)
    torch.save(weights, tmp_path / 'file.pt')
    with pytest.raises(CheckpointError, match=problem):
        pretrained(str(tmp_path / 'file.pt'), **options)


@pytest.mark.parametrize(
    ('of', 'name', 'problem'),
    [
        ('cpolynext_t', 'apolynext_t', "is of arch 'cpolynext_t'"),
        ('cpolynext_t', 'cpolynext_lr', "is of arch 'cpolynext_t'"),
        ('cpolynext_t', 'cpolynext_t_bn', "is of a network with norm='ln'"),
        ('cpolynext_t_bn', 'cpolynext_t', "is of a network with norm='bn'"),
    ],
)
def test_another_networks_file_is_recognized(tmp_path, of, name, problem):
    torch.save(released(of), tmp_path / 'file.pt')
    with pytest.raises(CheckpointError, match=problem):
        pretrained(str(tmp_path / 'file.pt'), name)


# Sizes of the norms of fully polynomial networks


@pytest.fixture
def bn_file(tmp_path) -> str:
    """The norms in it are for images of 64x64."""
    path = tmp_path / 'cpolynext_t_bn.pt'
    torch.save(released('cpolynext_t_bn'), path)
    return str(path)


def test_norms_have_the_size_of_the_file_or_the_one_that_is_asked_for(bn_file):
    name = 'cpolynext_t_bn'
    for size, expected in ((None, (64, 64)), (96, (96, 96)), ((32, 64), (32, 64))):
        for model in (
            pretrained(bn_file, name, norm_size=size),
            create(name, checkpoint_path=bn_file, norm_size=size),
            pretrained(bn_file, name, norm_size=size, features_only=True).model,
        ):
            assert model.norm_size == expected
    resized = pretrained(bn_file, name)
    resized.set_norm_size((32, 64))
    for key, value in pretrained(bn_file, name, norm_size=(32, 64)).state_dict().items():
        assert torch.equal(value, resized.state_dict()[key]), key


def test_the_first_batch_of_a_training_sets_the_size_in_one_process(bn_file, monkeypatch):
    model = pretrained(bn_file, 'cpolynext_t_bn').train()
    model(batch(96))
    assert model.norm_size == (96, 96) and model.head.norm.running_mean.shape == (3, 3)
    monkeypatch.setattr('polynext_mm.nn.batch_norm.many_processes', lambda: True)
    for size, expected in ((None, (64, 64)), (96, (96, 96))):  # what was there to be wrapped
        model = pretrained(bn_file, 'cpolynext_t_bn', norm_size=size).train()
        model(batch(128))
        assert model.norm_size == expected


def test_an_average_of_the_weights_takes_the_size_of_the_crop():
    model = create('cpolynext_t_bn', num_classes=3, norm_size=96).train()
    average = ModelEmaV3(model, decay=0.5)
    model(batch(96)).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = average.module.state_dict()['head.norm.running_mean'].clone()
    average.update(model)
    after = average.module.state_dict()['head.norm.running_mean']
    torch.testing.assert_close(after, (before + model.head.norm.running_mean) / 2)


# Alone


@pytest.mark.heavy
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
    for name in ('apolynext_b', 'cpolynext_lr', 'apolynext_t_bn'):
        assert python('-m', 'polynext_mm', 'timm', script, name) == 'True\n'
    assert python('-m', 'polynext_mm', 'run', script, 'apolynext_b') == 'False\n'


# What timm's train.py and validate.py do around a model, in their order.
TRAINING = """
import argparse
import json
import sys

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy

name, root, work_dir, model_kwargs = sys.argv[1:]
args = argparse.Namespace(model=name, lr=1e-3)
model_kwargs, epochs = json.loads(model_kwargs), 3
torch.manual_seed(0)


def validate(model):
    model.eval()
    hits = images = 0
    with torch.inference_mode():
        for x, y in val_loader:
            hits += accuracy(model(x), y)[0].item() * len(y)
            images += len(y)
    return hits / images


model = timm.create_model(name, num_classes=2, drop_path_rate=0.1, **model_kwargs)
model.set_grad_checkpointing()
data = resolve_data_config(dict(input_size=(3, 64, 64), batch_size=4), model=model)
options = dict(
    input_size=data['input_size'],
    batch_size=4,
    mean=data['mean'],
    std=data['std'],
    interpolation=data['interpolation'],
    crop_pct=data['crop_pct'],
    num_workers=0,
    persistent_workers=False,
    use_prefetcher=False,
    pin_memory=False,
)
train_set = create_dataset('', root=root, split='train', is_training=True)
val_set = create_dataset('', root=root, split='val')
train_loader = create_loader(
    train_set, is_training=True, scale=(0.5, 1), auto_augment='rand-m5', re_prob=0.1, **options
)
val_loader = create_loader(val_set, **options)
optimizer = create_optimizer_v2(model, 'adamw', lr=args.lr, weight_decay=0.05, layer_decay=0.9)
scheduler, _ = create_scheduler_v2(
    optimizer,
    'cosine',
    num_epochs=epochs,
    warmup_epochs=1,
    warmup_lr=1e-5,
    updates_per_epoch=len(train_loader),
    step_on_epochs=False,
)
average = ModelEmaV3(model, decay=0.5)
saver = CheckpointSaver(
    model, optimizer, args=args, model_ema=average, checkpoint_dir=work_dir, recovery_dir=work_dir
)
updates, rates = 0, set()
for epoch in range(epochs):
    model.train()
    for x, y in train_loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        updates += 1
        average.update(model, step=updates)
        scheduler.step_update(updates)
        rates.add(optimizer.param_groups[0]['lr'])
        assert loss.isfinite()
    best = saver.save_checkpoint(epoch, validate(average.module))[0]
assert len(rates) > epochs

top1 = validate(average.module)
last = f'{work_dir}/last.pth.tar'
trained = timm.create_model(name, num_classes=2, checkpoint_path=last, **model_kwargs)
assert validate(trained) == top1
without_average = timm.create_model(name, num_classes=2, **model_kwargs)
load_checkpoint(without_average, last, use_ema=False)
for expected, loaded in ((average.module, trained), (model, without_average)):
    for key, value in expected.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
print(f'best {best:.0f}, last {top1:.0f}')
"""


@pytest.fixture
def image_folder(tmp_path):
    """Two classes in timm's layout: noise that is dark, and noise that is bright."""
    rng = np.random.default_rng(0)
    for split, images in (('train', 8), ('val', 4)):
        for label, brightness in (('bright', 128), ('dark', 0)):
            folder = tmp_path / 'images' / split / label
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(brightness, brightness + 128, (80, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return tmp_path / 'images'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'model_kwargs'), [('cpolynext_t', '{}'), ('apolynext_t_bn', '{"norm_size": 64}')]
)
def test_what_train_py_does_around_a_model(tmp_path, image_folder, name, model_kwargs):
    script, work_dir = tmp_path / 'train.py', tmp_path / 'work_dir'
    script.write_text(TRAINING)
    work_dir.mkdir()
    command = ('-m', 'polynext_mm', 'timm', script, name, image_folder, work_dir, model_kwargs)
    assert 'last ' in python(*command)
    assert (work_dir / 'model_best.pth.tar').is_file()


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    monkeypatch.delitem(sys.modules, 'polynext_mm.timm')
    with pytest.raises(ImportError, match='pip install timm'):
        import polynext_mm.timm  # noqa: F401
