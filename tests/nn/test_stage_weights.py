"""Weights are made ready once for a stage, and kept in inference until one changes."""

import copy

import pytest
import torch
from torch import nn

from polynext_mm.nn import PolyNeXt, plain_ops, stage_weights
from tests import golden
from tests.helpers import zipped
from tests.helpers.tiny import TINY_ARCH, randomized


def tiny(**settings) -> PolyNeXt:
    return randomized(PolyNeXt(TINY_ARCH, **settings)).double().eval()


def features(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return model(golden.image((32, 48), batch=2).double())


def exact(model: nn.Module) -> list[torch.Tensor]:
    with plain_ops():
        return features(model)


def assert_close(actual, expected):
    for a, b in zipped(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * b.abs().max().item())


@pytest.fixture
def made(monkeypatch):
    """List how many weights are made ready, call by call."""
    calls = []
    function = stage_weights.made_ready

    def spy(wanted):
        calls.append(len(wanted))
        return function(wanted)

    monkeypatch.setattr(stage_weights, 'made_ready', spy)
    return calls


def test_they_are_made_once_for_each_stage_and_kept_without_gradients(made):
    model = tiny()
    expected = features(model)
    assert len(made) == len(model.stages)
    assert all(map(torch.equal, features(model), expected))
    assert len(made) == len(model.stages)
    model(golden.image((32, 48), batch=2).double())
    assert len(made) == 2 * len(model.stages)
    model.train()
    features(model)
    features(model)
    assert len(made) == 4 * len(model.stages)


def changed_in_place(model):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.1)


def given_other_memory(model):
    for param in model.parameters():
        param.data = param.data * 1.1


def loaded(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def loaded_by_assignment(model):
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model):
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(param.detach() * 1.1))


def exchanged_by_an_average(model):
    """As EMA hooks do around an evaluation, behind the back of version counters."""
    model.train()
    for param in model.parameters():
        param.data.mul_(1.1)
    model.eval()


def rounded(model):
    model.bfloat16().double()


def fused(model):
    model.fuse()


@pytest.mark.parametrize(
    'change',
    [
        changed_in_place,
        given_other_memory,
        loaded,
        loaded_by_assignment,
        replaced,
        exchanged_by_an_average,
        rounded,
        fused,
    ],
    ids=lambda change: change.__name__,
)
def test_kept_weights_follow_every_change(change):
    model = tiny()
    before = features(model)
    change(model)
    found = features(model)
    assert not torch.equal(found[-1], before[-1])
    assert_close(found, exact(model))


def test_a_change_of_one_logit_counts():
    model = tiny()
    for stage in model.stages:
        for name, param in stage.named_parameters():
            if 'logit' in name or 'scale' in name:
                before = features(model)
                with torch.no_grad():
                    param[..., :1].add_(0.5)
                assert not torch.equal(features(model)[-1], before[-1]), name
    assert_close(features(model), exact(model))


def test_a_hook_or_another_layer_is_noticed():
    model = tiny()
    expected = features(model)
    seen = []
    norm = model.cells()[0].stacks[0].mlp.norm
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    assert_close(features(model), expected)
    handle.remove()
    stack = model.cells()[-1].stacks[-1]

    def halve(module, args):
        with torch.no_grad():
            module.mlp.proj_out.weight.mul_(0.5)

    stack.register_forward_pre_hook(halve)
    found = features(model)
    stack._forward_pre_hooks.clear()
    assert seen and not torch.equal(found[-1], expected[-1])
    assert_close(found, exact(model))


def test_copies_keep_weights_of_their_own():
    model = tiny()
    expected = features(model)
    copied = copy.deepcopy(model)
    changed_in_place(model)
    assert_close(features(copied), expected)
    assert not torch.equal(features(model)[-1], expected[-1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_its_own(dtype):
    model, image = tiny().float(), golden.image((32, 48), batch=2)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast('cpu', dtype):
            narrow = model(image)
        again = model(image)
    assert all(map(torch.equal, again, expected))
    assert not torch.equal(narrow[-1], expected[-1])


def test_inference_mode_may_come_first_or_last():
    model = tiny()
    image = golden.image((32, 48), batch=2).double()
    with torch.inference_mode():
        expected = model(image)
    assert all(map(torch.equal, features(model), expected))
    golden.loss(model.train()(image), (32, 48)).backward()
    with torch.inference_mode():
        assert all(map(torch.equal, model.eval()(image), expected))


@pytest.mark.parametrize('with_cp', [False, True])
def test_frozen_weights_get_no_gradient_and_change_none(with_cp):
    image = golden.image((32, 48), batch=2).double()

    def gradients(frozen):
        model = tiny(with_cp=with_cp).train()
        for i, param in enumerate(model.parameters()):
            param.requires_grad_(i % 3 != frozen)
        golden.loss(model(image), (32, 48)).backward()
        return [param.grad for param in model.parameters()]

    expected = gradients(None)
    for frozen in range(3):
        for i, (found, whole) in enumerate(zip(gradients(frozen), expected)):
            if i % 3 == frozen:
                assert found is None
            elif whole is not None:
                scale = whole.abs().max().clamp_min(1e-3).item()
                torch.testing.assert_close(found, whole, rtol=0, atol=1e-11 * scale)
