"""Polynomial attention: exact, differentiable, finite in half precision, in blocks or whole."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from polynext_mm.compat.torch_features import CUSTOM_OPERATORS, EXPORT
from polynext_mm.nn.ops import poly_attention_sums
from polynext_mm.nn.ops.poly_attention import plain, poly_attention
from tests.marks import needs

module = importlib.import_module('polynext_mm.nn.ops.poly_attention_blocks')


def naive(q, k, v):
    a = (1 + q @ k.transpose(-2, -1)) ** 4
    return a @ v / a.sum(-1, keepdim=True)


def inputs(tokens=70, scale=1.0, dtype=torch.float64, heads=3):
    torch.manual_seed(tokens)
    return [
        (torch.randn(2, heads, tokens, 32, dtype=torch.float64) * s).to(dtype).requires_grad_()
        for s in (scale, 1.0, 1.0)
    ]


@pytest.fixture(
    params=[(1 << 7, 1), (1 << 7, 3), (1 << 13, 2), (1 << 20, 2)],
    ids=['queries of a head', 'cut for threads', 'heads and queries', 'one block'],
)
def block(request, monkeypatch):
    size, threads = request.param
    monkeypatch.setattr(module, 'THREAD_BLOCK', size)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)


@pytest.mark.parametrize('tokens', [1, 16, 70, 257])
def test_forward_and_backward_are_exact(block, tokens):
    for form in (poly_attention, plain):
        ours, theirs = inputs(tokens), inputs(tokens)
        out, expected = form(*ours), naive(*theirs)
        assert (out - expected).abs().max() < 1e-12
        cotangent = torch.randn_like(out)
        out.backward(cotangent)
        expected.backward(cotangent)
        for a, b in zip(ours, theirs):
            assert (a.grad - b.grad).abs().max() < 1e-12 * max(1, b.grad.abs().max())


def test_gradcheck(block):
    q, k, v = (t.detach()[:1, :1, :, :4].contiguous().requires_grad_() for t in inputs(9))
    assert torch.autograd.gradcheck(poly_attention, (q, k, v))


@needs(CUSTOM_OPERATORS)
def test_operator_is_well_formed():
    q, k, v = (t.detach()[0].float().requires_grad_() for t in inputs(20))
    torch.library.opcheck(torch.ops.polynext_mm.poly_attention, (q, k, v))


@pytest.mark.parametrize('wide_devices', [('cpu',), ()], ids=['in float32', 'in half'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(block, dtype, wide_devices, monkeypatch):
    """Other devices than CPUs multiply scores in half."""
    monkeypatch.setattr(module, 'WIDE_DEVICES', wide_devices)
    q, k, v = inputs(300, scale=30.0, dtype=dtype)
    assert (q @ k.transpose(-2, -1)).abs().max() > 500
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    out, expected = poly_attention(q, k, v), poly_attention(*wide)
    assert out.dtype is dtype
    eps = torch.finfo(dtype).eps
    assert (out.float() - expected).abs().max() < 4 * eps * expected.abs().max()
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip((q, k, v), wide):
        assert a.grad.isfinite().all()
        assert (a.grad.float() - b.grad).norm() < 16 * eps * b.grad.norm()


@pytest.mark.parametrize('wide_devices', [('cpu',), ()], ids=['in float32', 'in half'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_undivided_sums_in_half_precision(block, dtype, wide_devices, monkeypatch):
    monkeypatch.setattr(module, 'WIDE_DEVICES', wide_devices)
    q, k, v = inputs(70, scale=0.3, dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    eps = torch.finfo(dtype).eps
    found, expected = poly_attention_sums(q, k, v), poly_attention_sums(*wide)
    for a, b in zip(found, expected):
        assert a.dtype is torch.float32
        assert (a - b).norm() < 8 * eps * b.norm()
    for sums in (found, expected):
        sum(t.square().mean().sqrt() for t in sums).backward()
    for a, b in zip((q, k, v), wide):
        assert a.grad.dtype is dtype
        assert (a.grad.float() - b.grad).norm() < 16 * eps * b.grad.norm()


@needs(CUSTOM_OPERATORS)
def test_operations_are_counted_in_both_directions():
    q, k, v = (t.detach().float().requires_grad_() for t in inputs(50))
    product = 2 * 2 * 3 * 50 * 50 * 32
    with FlopCounterMode(display=False) as forward:
        out = poly_attention(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


def test_memory_is_linear_in_tokens():
    """What autograd keeps is q, k, v, the output and a row sum: no matrix of tokens x tokens."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        poly_attention(*inputs(500, dtype=torch.float32))
    assert sum(kept) <= 2 * 3 * 500 * (4 * 32 + 1)


@pytest.mark.heavy
@needs(EXPORT)
def test_export_takes_the_plain_form():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return poly_attention(q, k, v)

    q, k, v = (t.detach().float() for t in inputs(20))
    program = torch.export.export(Attention(), (q, k, v))
    assert not any('poly_attention' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q, k, v), poly_attention(q, k, v))


def test_sizes_do_not_recompile_one_by_one():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(poly_attention, backend=counter, fullgraph=True)
    for tokens in (20, 30, 40, 50, 60):
        compiled(*(t.detach() for t in inputs(tokens)))
    assert counter.frame_count == 2  # the first size, then any size
    torch._dynamo.reset()
