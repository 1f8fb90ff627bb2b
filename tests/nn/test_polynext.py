"""The network against the authors' release: outputs, logits, gradients, parameters, operations."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polynext_mm.compat.torch_features import CUSTOM_OPERATORS
from polynext_mm.nn import ARCHS, Arch, PolyNeXt, PolyNeXtClassifier, get_arch, plain_ops
from polynext_mm.weights.names import authors_to_ours, translate
from tests import golden
from tests.helpers import zipped
from tests.marks import some_slow

# published: million parameters, GMACs at 224 (classifier included), and the MACs counted in the
# release
PUBLISHED = {
    'cpolynext_t': ('6.4', 1.2, 1.20),
    'apolynext_t': ('6.5', 1.3, 1.34),
    'cpolynext_s': ('26', 4.8, 4.78),
    'apolynext_s': ('26', 5.3, 5.29),
    'cpolynext_b': ('40', 8.5, 8.50),
    'apolynext_b': ('41', 9.3, 9.31),
    'cpolynext_l': ('57', 12.6, 12.62),
    'apolynext_l': ('57', 13.3, 13.35),
}
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-7)}


@pytest.fixture(scope='module', params=golden.NETWORKS)
def network(request):
    return golden.Golden(request.param), request.param


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_outputs_and_gradients_are_the_releases(network, dtype):
    numbers, name = network
    weights = numbers.state_dict()
    model = PolyNeXtClassifier(name, len(weights['head.3.bias'])).to(dtype).eval()
    model.load_state_dict(translate(weights, model.arch), strict=True)
    theirs = {ours: key for key, ours in authors_to_ours(model.arch).items()}
    close, close_norm = TOLERANCE[dtype]
    for size, case in numbers.cases.items():
        model.zero_grad()
        features = list(model.forward_stages(golden.image(size).to(dtype)))
        for stage, feature in enumerate(features):
            index, value, absmean = numbers.values(size, stage)
            assert list(feature.shape) == case['shapes'][stage]
            assert (feature.reshape(-1)[index] - value).abs().max() < close * absmean
        logits = numbers.logits(size)
        assert (model.head(features[-1]) - logits).abs().max() < close * logits.abs().mean()
        golden.loss(features, size).backward()
        for key, param in model.named_parameters():
            if not key.startswith('head.'):
                expected = case['grad_norm'][theirs[key]]
                assert abs(param.grad.norm().item() - expected) <= close_norm * expected, key


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_and_operations_are_the_published(name):
    millions, gmacs, counted = PUBLISHED[name]
    with torch.device('meta'):
        model = PolyNeXtClassifier(name).eval()
        image = torch.empty(1, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert f'{parameters:.{1 if "." in millions else 0}f}' == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    macs = counter.get_total_flops() / 2 / 1e9
    if name.startswith('a') and not CUSTOM_OPERATORS.is_there:
        pytest.skip('torch before 2.4 counts a column for the row sums of attention')
    assert abs(macs - gmacs) <= 0.06
    assert abs(macs - counted) <= 0.005


def test_low_resolution_has_the_published_parameters_and_strides():
    with torch.device('meta'):
        model = PolyNeXtClassifier('cpolynext_lr', num_classes=10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 5.46
    assert model.arch.strides == (1, 2, 4)
    assert model.arch.widths == (72, 144, 288)
    assert len(PUBLISHED) + 1 == len(ARCHS)


def test_backward_counts_twice_the_operations_and_no_less():
    with torch.device('meta'):
        model = PolyNeXt('apolynext_t')
        image = torch.empty(1, 3, 64, 64)
    with FlopCounterMode(display=False) as forward:
        features = model(image)
    with FlopCounterMode(display=False) as backward:
        sum(f.sum() for f in features).backward()
    assert backward.get_total_flops() > 1.8 * forward.get_total_flops()


def test_a_custom_arch_is_a_dict_of_the_same_fields():
    fields = dataclasses.asdict(ARCHS['cpolynext_t']) | dict(
        widths=[16, 32],
        depths=[1, 2],
        stacks=[1, 2],
        mixers=['conv', 'attn'],
        conv_ratios=[1, 1],
        mlp_ratios=[2, 2],
        coarse_sizes=[3, 7],
    )
    model = PolyNeXt(fields)
    assert [tuple(f.shape) for f in model(torch.randn(2, 3, 40, 64))] == [
        (2, 16, 10, 16),
        (2, 32, 5, 8),
    ]
    assert get_arch(fields) == Arch(**fields)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(depths=(1, 2)), 'depths'),
        (dict(widths=(48, 96, 192, 0)), 'widths'),
        (dict(mixers=('conv', 'conv', 'mlp', 'conv')), "'conv', 'attn'"),
        (dict(downsampling=('sep3x3',)), 'full3x3'),
        (dict(mlp_ratios=(1.03, 2, 2, 2)), 'even'),
        (dict(gate_init=(0.0, 0.0)), 'gate_init'),
        (dict(paired_gates=1), 'paired_gates'),
        (dict(stacks=3), 'stacks'),
        (dict(conv_ratios=(1, 1, 1, 'x')), 'conv_ratios'),
        (dict(coarse_sizes=(3, 4, 5, 5)), 'odd'),
        (dict(stem_size=4), 'stem_size must be an odd positive integer'),
        (dict(stem_stride=0), 'stem_stride must be a positive integer'),
        (dict(stem_stride=(4,)), 'stem_stride'),
        (dict(norm='bn'), 'unknown fields'),
    ],
)
def test_a_wrong_custom_arch_says_which_field(change, message):
    fields = dataclasses.asdict(ARCHS['cpolynext_t']) | change
    with pytest.raises(ValueError, match=message):
        get_arch(fields)


def test_unknown_arch_names_the_choices():
    with pytest.raises(ValueError, match='apolynext_l'):
        get_arch('polynext_s')


@pytest.mark.parametrize('name', ['cpolynext_t', 'apolynext_t'])
def test_fused_network_computes_the_same(name):
    torch.manual_seed(0)
    model = PolyNeXt(name).eval()
    numbers = golden.Golden(name)
    weights = translate(numbers.state_dict(), model.arch)
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith('head.')})
    image = golden.image((64, 96))
    with torch.no_grad():
        before = model(image)
        after = model.fuse()(image)
        again = model.fuse()(image)
    assert not any('gate' in key or 'scale_logit' in key for key in model.state_dict())
    for a, b, c in zip(before, after, again):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
        assert torch.equal(b, c)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cpolynext_t', 'apolynext_t'])
def test_the_whole_network_compiles_to_one_graph(name):
    # in float64: compilers take the equations, whose rounding differs from that of the kernels
    model = PolyNeXt(name).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        for size in ((64, 64), (64, 96)):
            image = golden.image(size).double()
            for a, b in zip(model(image), compiled(image)):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.slow
def test_training_compiles_to_one_graph():
    model = PolyNeXt('apolynext_t')
    image = golden.image((64, 64))
    golden.loss(model(image), (64, 64)).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    golden.loss(
        torch.compile(model, fullgraph=True, backend='aot_eager')(image), (64, 64)
    ).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], msg=key)
    torch._dynamo.reset()


def features_and_gradients(model, plain, seed=0):
    """Both of a training step in float64, with the same draws of drop path."""
    torch.manual_seed(seed)
    model.zero_grad()
    with plain_ops(plain):
        features = model(golden.image((32, 48), batch=2).double())
    golden.loss(features, (32, 48)).backward()
    return [*features, *(param.grad.clone() for param in model.parameters())]


def assert_same(actual, expected):
    for a, b in zipped(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(1, b.abs().max().item()))


LARGE = ('cpolynext_b', 'cpolynext_l', 'apolynext_b', 'apolynext_l')


@pytest.mark.parametrize('name', some_slow(ARCHS, LARGE))
def test_plain_operations_and_kernels_are_the_same_network(name):
    model = PolyNeXt(name, drop_path_rate=0.3).double()
    expected = features_and_gradients(model, plain=True)
    assert_same(features_and_gradients(model, plain=False), expected)


def test_checkpointed_cells_are_computed_again_in_the_form_that_forward_took():
    model = PolyNeXt('apolynext_t', drop_path_rate=0.3).double()
    expected = features_and_gradients(model, plain=True)
    checkpointed = PolyNeXt('apolynext_t', drop_path_rate=0.3, with_cp=True).double()
    checkpointed.load_state_dict(model.state_dict())
    assert_same(features_and_gradients(checkpointed, plain=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cpolynext_t', 'apolynext_t'])
def test_the_whole_network_exports_for_any_size(name):
    model = PolyNeXt(name).double().eval()
    height, width = (torch.export.Dim(side, min=2, max=32) for side in 'hw')
    program = torch.export.export(
        model,
        (golden.image((64, 96), batch=2).double(),),
        dynamic_shapes=({2: 32 * height, 3: 32 * width},),
    )
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any('polynext_mm' in operator for operator in operators)
    for size in ((64, 96), (128, 64)):
        image = golden.image(size, batch=2).double()
        for exported, feature in zipped(program.module()(image), model(image)):
            torch.testing.assert_close(exported, feature)
