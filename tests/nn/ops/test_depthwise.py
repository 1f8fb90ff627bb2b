"""Depthwise convolution is torch's in both directions, as an operator that counts and compiles."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from polynext_mm.compat.torch_features import CUSTOM_OPERATORS, EXPORT
from polynext_mm.nn.ops.depthwise import depthwise
from tests.marks import needs

module = importlib.import_module('polynext_mm.nn.ops.depthwise')


def inputs(size, batch=2, height=13, width=9, channels=6, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        torch.randn(batch, height, width, channels, dtype=dtype, requires_grad=True),
        torch.randn(channels, 1, size, size, dtype=dtype, requires_grad=True),
    )


def torchs(x, weight, dilation):
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        None,
        1,
        dilation * (weight.shape[-1] // 2),
        dilation,
        x.shape[-1],
    )
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize('kernel', [1, 40, 1 << 11], ids=['row by row', 'bands', 'whole'])
@pytest.mark.parametrize(('size', 'dilation'), itertools.product((3, 5, 7), (1, 2)))
def test_it_is_torchs_convolution(size, dilation, kernel, monkeypatch):
    monkeypatch.setattr(module, 'CPU_KERNEL', kernel)
    ours, theirs = inputs(size), inputs(size)
    out, expected = depthwise(*ours, dilation), torchs(*theirs, dilation)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (2, 1), (1, 7), (64, 65)])
def test_any_size_of_map(height, width):
    ours, theirs = (inputs(5, height=height, width=width) for _ in range(2))
    depthwise(*ours, 2).sum().backward()
    torchs(*theirs, 2).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_half_of_the_channels_of_a_map():
    """As attention hands over the halves of one projection."""
    x, weight = inputs(3)
    half = x.detach().repeat(1, 1, 1, 2)[..., 3:9].requires_grad_()
    torch.testing.assert_close(depthwise(half, weight), torchs(half, weight, 1))


@pytest.mark.parametrize(('size', 'dilation'), [(3, 1), (3, 2), (5, 2)])
def test_bfloat16_gradients_are_close(size, dilation):
    x, weight = inputs(size, height=40, width=40, dtype=torch.float32)
    expected = torch.autograd.grad(depthwise(x, weight, dilation).square().sum(), (x, weight))
    actual = torch.autograd.grad(
        depthwise(x.bfloat16(), weight, dilation).float().square().sum(), (x, weight)
    )
    for a, b in zip(actual, expected):
        assert a.dtype is torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@needs(CUSTOM_OPERATORS)
def test_operator_is_well_formed():
    x, weight = inputs(5, dtype=torch.float32)
    torch.library.opcheck(torch.ops.polynext_mm.depthwise, (x, weight, 2))


@needs(CUSTOM_OPERATORS)
def test_operations_are_counted_in_both_directions():
    x, weight = inputs(5)
    once = 2 * x.numel() * 25
    with FlopCounterMode(display=False) as forward:
        out = depthwise(x, weight, 2)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (once, 2 * once)


@pytest.mark.heavy
@needs(EXPORT)
def test_export_takes_torchs_convolution():
    class Convolution(torch.nn.Module):
        def forward(self, x, weight):
            return depthwise(x, weight, 2)

    x, weight = (t.detach() for t in inputs(5))
    program = torch.export.export(Convolution(), (x, weight))
    assert not any('polynext_mm' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, weight), depthwise(x, weight, 2))
