"""Whole networks on the device, against the CPU."""

import contextlib

import pytest
import torch

from polynext_mm.nn import ARCHS, PolyNeXt, plain_ops
from tests import golden
from tests.cuda.on_device import DEVICE, loss_of
from tests.helpers import zipped
from tests.helpers.tiny import TINY_ARCH, randomized

SIZE = (64, 96)
NAMES = sorted(ARCHS) if DEVICE != 'cpu' else ['cpolynext_t', 'apolynext_t']
networks = pytest.mark.parametrize(
    ('arch', 'norm'), [(arch, norm) for arch in NAMES for norm in ('ln', 'bn')]
)


def build(arch, norm='ln', **settings):
    if norm == 'bn':
        settings['norm_size'] = SIZE
    return randomized(PolyNeXt(arch, norm=norm, **settings))


def features_and_gradient(model, device, dtype=None, model_dtype=torch.float32):
    """All features of a training step, and the gradients as one vector, on the CPU in float64."""
    model = model.to(device, model_dtype).train()
    model.zero_grad()
    image = golden.image(SIZE, batch=2).to(device, model_dtype)
    amp = torch.autocast(device, dtype) if dtype else contextlib.nullcontext()
    with amp:
        features = model(image)
    loss_of(features).backward()
    gradient = torch.cat([param.grad.double().flatten().cpu() for param in model.parameters()])
    return [feature.detach().double().cpu() for feature in features] + [gradient]


def errors(actual, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zipped(actual, expected)]


@networks
def test_float32(arch, norm, device):
    expected = features_and_gradient(build(arch, norm), 'cpu', model_dtype=torch.float64)
    found = errors(features_and_gradient(build(arch, norm), device), expected)
    on_cpu = errors(features_and_gradient(build(arch, norm), 'cpu'), expected)
    assert all(a <= 4 * b + 1e-5 for a, b in zip(found, on_cpu)), (found, on_cpu)


@networks
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_on_the_cpu(arch, norm, dtype, device):
    expected = features_and_gradient(build(arch, norm), 'cpu')
    found = errors(features_and_gradient(build(arch, norm), device, dtype), expected)
    on_cpu = errors(features_and_gradient(build(arch, norm), 'cpu', dtype), expected)
    eps = torch.finfo(dtype).eps
    assert all(a <= 2 * b + eps for a, b in zip(found, on_cpu)), (found, on_cpu)


@pytest.mark.parametrize('arch', NAMES)
def test_a_model_in_bfloat16(arch, device):
    expected = features_and_gradient(build(arch), 'cpu')
    found, on_cpu = (
        errors(features_and_gradient(build(arch), place, model_dtype=torch.bfloat16), expected)
        for place in (device, 'cpu')
    )
    eps = torch.finfo(torch.bfloat16).eps
    assert all(a <= 2 * b + eps for a, b in zip(found, on_cpu)), (found, on_cpu)


@networks
def test_kernels_and_plain_forms_agree_on_the_device(arch, norm, device):
    kernels = features_and_gradient(build(arch, norm), device)
    with plain_ops():
        plain = features_and_gradient(build(arch, norm), device)
    found = errors(kernels, plain)
    assert all(error < 1e-3 for error in found), found


@pytest.mark.parametrize('settings', [dict(with_cp=True), dict(grad_clip_norm=5.0)], ids=str)
def test_options(settings, device):
    model = build(TINY_ARCH, **settings)
    expected = features_and_gradient(build(TINY_ARCH, **settings), 'cpu')
    assert max(errors(features_and_gradient(model, device), expected)) < 1e-3


@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_compiled_cells(mode, train, device):
    torch._dynamo.reset()
    compiled = build(TINY_ARCH).to(device).train(train).compile_cells(mode)
    eager = build(TINY_ARCH).to(device).train(train)
    image = golden.image(SIZE, batch=2).to(device)
    for _ in range(4):  # a graph is recorded in the second step, and replayed afterwards
        results = []
        for model in (compiled, eager):
            with torch.set_grad_enabled(train):
                features = model(image)
            results.append([feature.detach().double().cpu() for feature in features])
            if train:
                loss_of(features).backward()
                results[-1].append(
                    torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])
                )
                model.zero_grad()
        assert max(errors(*results)) < 1e-4
    torch._dynamo.reset()
