"""The plain formulation and the fast network are the same function."""

import pytest
import torch

from golden import Golden, image, loss
from polynext_mm.nn import ARCHS, PolyNeXt
from polynext_mm.nn.plain import PlainPolyNeXt
from polynext_mm.weights.names import CLASSIFIER, DROPOUT_RATE, authors_to_ours, translate

SIZE = (64, 96)


def backbone_weights(network):
    """Weights of the golden recipe with the authors' names, without the classifier, float64."""
    return {
        key: value.double()
        for key, value in Golden(network).state_dict().items()
        if key not in (*CLASSIFIER, DROPOUT_RATE)
    }


def run(model):
    """Features of the recipe's image, and the gradient of the recipe's loss by that image."""
    x = image(SIZE).double().requires_grad_()
    features = model(x)
    loss(features, SIZE).backward()
    return features, x.grad


def assert_same(actual, expected):
    """Equal to 1e-12 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize('network', ['cpolynext_t', 'apolynext_t'])
def test_plain_and_fast_agree(network):
    weights = backbone_weights(network)
    plain, fast = PlainPolyNeXt(network).double(), PolyNeXt(network).double()
    plain.load_state_dict(weights)
    fast.load_state_dict(translate(weights, fast.arch))

    features, grad = run(plain)
    fast_features, fast_grad = run(fast)

    assert_same(fast_grad, grad)
    for fast_feature, feature in zip(fast_features, features, strict=True):
        assert_same(fast_feature, feature)
    gradients = translate({name: p.grad for name, p in plain.named_parameters()}, fast.arch)
    assert gradients.keys() == dict(fast.named_parameters()).keys()
    for name, parameter in fast.named_parameters():
        assert_same(parameter.grad, gradients[name])


@pytest.mark.parametrize('name', ARCHS)
def test_every_arch_has_the_names_of_the_checkpoints(name):
    with torch.device('meta'):
        plain = PlainPolyNeXt(name)
    backbone = {
        key
        for key in authors_to_ours(ARCHS[name])
        if not key.startswith('extra_norms.') and key not in CLASSIFIER
    }
    assert set(plain.state_dict()) == backbone
