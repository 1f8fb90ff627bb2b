"""The plain formulation and the fast network are the same function."""

import pytest
import torch

from polynext_mm.nn import ARCHS, PolyNeXt
from polynext_mm.nn.plain import PlainPolyNeXt
from polynext_mm.weights.names import CLASSIFIER, DROPOUT_RATE, authors_to_ours, translate
from tests.golden import Golden, authors_weights, image, loss
from tests.helpers import zipped

pytestmark = pytest.mark.heavy

SIZE = (64, 96)
SMALL = (16, 24)  # for strides 1, 2, 4


def backbone_weights(network):
    """Weights of the golden recipe with the authors' names, without the classifier, float64."""
    return {
        key: value.double()
        for key, value in Golden(network).state_dict().items()
        if key not in (*CLASSIFIER, DROPOUT_RATE)
    }


def run(model, size):
    """Features of the recipe's images, and the gradient of the recipe's loss by these."""
    x = image(size, batch=2).double().requires_grad_()
    features = model(x)
    loss(features, size).backward()
    return features, x.grad


def assert_same(actual, expected, tolerance=1e-12):
    """Equal to a small part of the largest value."""
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('network', ['cpolynext_t', 'apolynext_t', 'cpolynext_lr'])
def test_plain_and_fast_agree(network):
    weights = backbone_weights(network)
    plain, fast = PlainPolyNeXt(network).double(), PolyNeXt(network).double()
    plain.load_state_dict(weights)
    fast.load_state_dict(translate(weights, fast.arch))
    assert_same_network(plain, fast, SMALL if network == 'cpolynext_lr' else SIZE)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('network', ['cpolynext_t', 'apolynext_t'])
def test_plain_and_fast_fully_polynomial_networks_agree(network, training):
    """Also in the statistics that a step of training leaves."""
    plain = PlainPolyNeXt(network, SIZE).double()
    plain.load_state_dict(
        authors_weights({name: p.shape for name, p in plain.named_parameters()}), strict=False
    )
    take_statistics_of_a_batch(plain)
    plain.train(training)
    fast = PolyNeXt(network, norm='bn', norm_size=SIZE).double().train(training)
    fast.load_state_dict(translate(plain.state_dict(), fast.arch))
    # without division by what a map itself has, roundings multiply as the values do
    assert_same_network(plain, fast, tolerance=1e-11)
    state = fast.state_dict()
    for name, value in translate(plain.state_dict(), fast.arch).items():
        assert_same(state[name].double(), value.double())
    assert int(state['stages.0.cells.0.norm.num_batches_tracked']) == 1 + training


def take_statistics_of_a_batch(plain):
    """Polynomials explode on statistics that are not theirs."""
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    with torch.no_grad():
        plain.train()(image(SIZE, batch=2).double())
    for name, buffer in plain.named_buffers():
        if buffer.ndim:
            buffer.copy_((buffer - 0.9 * before[name]) / 0.1)


def assert_same_network(plain, fast, size=SIZE, tolerance=1e-12):
    features, grad = run(plain, size)
    fast_features, fast_grad = run(fast, size)

    assert_same(fast_grad, grad, tolerance)
    for fast_feature, feature in zipped(fast_features, features):
        assert_same(fast_feature, feature, tolerance)
    gradients = translate({name: p.grad for name, p in plain.named_parameters()}, fast.arch)
    assert gradients.keys() == dict(fast.named_parameters()).keys()
    for name, parameter in fast.named_parameters():
        assert_same(parameter.grad, gradients[name], tolerance)


@pytest.mark.parametrize('name', ARCHS)
@pytest.mark.parametrize('norm', ['ln', 'bn'])
def test_every_arch_has_the_names_of_the_checkpoints(name, norm):
    with torch.device('meta'):
        plain = PlainPolyNeXt(name, SIZE if norm == 'bn' else None)
    backbone = {
        key
        for key, ours in authors_to_ours(ARCHS[name], norm).items()
        if not ours.startswith(('head.', 'out_norms.'))
    }
    assert set(plain.state_dict()) == backbone
