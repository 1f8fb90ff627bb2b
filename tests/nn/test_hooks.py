"""What forward hooks see, and that no module changes its arguments."""

import pytest
import torch
from torch import Tensor, nn

from polynext_mm.nn import PolyNeXt, get_arch
from polynext_mm.nn.cell import Cell, Stack, Stage
from polynext_mm.nn.layers import Branch, PolyAttn, PolyConv, PolyMLP
from polynext_mm.nn.ops import blocks
from tests.helpers import zipped
from tests.helpers.tiny import TINY_ARCH, randomized

HOOKED = (Branch, Stack, Cell, Stage)
TRAINING = pytest.mark.parametrize('needs_grad', [False, True], ids=['inference', 'training'])


def tensors(value) -> list[Tensor]:
    """Return the tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zipped(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


def seen_by_hooks(model: nn.Module, x: Tensor, needs_grad: bool) -> list[Tensor]:
    """Return copies of all inputs and outputs that hooks saw, in order.

    That the tensors themselves still hold the same at the end is checked.
    """
    kept, copies = [], []

    def keep(module, args, output):
        found = tensors((*args, output))
        kept.extend(found)
        copies.extend(t.detach().clone() for t in found)

    handles = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, HOOKED)
    ]
    with torch.set_grad_enabled(needs_grad):
        model(x)
    for handle in handles:
        handle.remove()
    assert_same([t.detach() for t in kept], copies)
    return copies


@pytest.mark.parametrize('fused', [False, True])
def test_hooks_see_the_same_with_and_without_gradients(fused, monkeypatch):
    monkeypatch.setattr(blocks, 'CPU_BLOCK', 1 << 9)  # several blocks and bands
    model = randomized(PolyNeXt(TINY_ARCH)).double().eval()
    if fused:
        model.fuse()
    x = torch.randn(2, 3, 64, 96).double().requires_grad_()
    without, with_gradients = (seen_by_hooks(model, x, mode) for mode in (False, True))
    assert len(without) >= 2 * sum(isinstance(module, HOOKED) for module in model.modules())
    assert_same(with_gradients, without)


def module_and_arguments(kind: type) -> tuple[nn.Module, tuple]:
    """Return a module of the tiny network and arguments to call it with, float64."""
    arch = get_arch(TINY_ARCH)
    stage = 2 if kind is PolyAttn else 1
    network = randomized(PolyNeXt(arch)).double()
    module = next(module for module in network.stages[stage].modules() if isinstance(module, kind))
    width = arch.widths[stage - 1 if kind is Stage else stage]
    maps = [torch.randn(2, 24, 20, width).double() for _ in range(2)]
    gate, keep = torch.rand(()).double(), torch.rand(2, 1, 1, 1).double()
    if kind in (Cell, Stage):
        return module, tuple(maps)
    if kind is Stack:
        return module, (maps[0], (gate, gate + 1), torch.stack((keep, keep + 1)))
    return module, (maps[0], gate, keep)


@TRAINING
@pytest.mark.parametrize('kind', [PolyMLP, PolyConv, PolyAttn, Stack, Cell, Stage])
def test_arguments_stay_as_they_are(kind, needs_grad, monkeypatch):
    monkeypatch.setattr(blocks, 'CPU_BLOCK', 1 << 9)
    module, arguments = module_and_arguments(kind)
    given = tensors(arguments)
    before = [t.clone() for t in given]
    if needs_grad:
        given[0].requires_grad_()
    with torch.set_grad_enabled(needs_grad):
        out = module(*arguments)
    outs = tensors(out)
    if needs_grad:
        sum(t.square().sum() for t in outs).backward()
    for t, copy in zip(given, before):
        assert torch.equal(t, copy)
    # of the pair that a stage returns, the first may be the second that it got
    storages = {t.untyped_storage().data_ptr() for t in given}
    assert outs[-1].untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize('kind', [PolyMLP, PolyConv, PolyAttn, Stack])
def test_a_result_goes_where_it_is_wanted(kind, monkeypatch):
    monkeypatch.setattr(blocks, 'CPU_BLOCK', 1 << 9)
    module, arguments = module_and_arguments(kind)
    with torch.no_grad():
        expected = module(*arguments)
        x = arguments[0]
        assert module(*arguments, out=x) is x
    assert torch.equal(x, expected)
    # with gradients a map that backward needs is not overwritten
    before = x.clone().requires_grad_()
    assert module(before, *arguments[1:], out=before) is not before


@pytest.mark.parametrize('observe', [None, Branch, Stack, Cell, 'everything'])
def test_memory_is_used_again_where_nobody_looks(observe, monkeypatch):
    """All stacks of a cell write into one map, unless a hook would see it change."""
    monkeypatch.setattr(blocks, 'CPU_BLOCK', 1 << 9)
    model = randomized(PolyNeXt(TINY_ARCH)).double().eval()
    written = []
    forward = Stack.forward

    def spy(self, x, gates=(None, None), keep=None, out=None, *weights):
        written.append(out)
        return forward(self, x, gates, keep, out, *weights)

    monkeypatch.setattr(Stack, 'forward', spy)
    x = torch.randn(2, 3, 64, 96).double()
    with torch.no_grad():
        expected = model(x)
    assert written and all(out is not None for out in written)
    written.clear()
    if observe == 'everything':
        handles = [nn.modules.module.register_module_forward_hook(lambda *_: None)]
    else:
        handles = [
            module.register_forward_hook(lambda *_: None)
            for module in model.modules()
            if observe and isinstance(module, observe)
        ]
    with torch.set_grad_enabled(observe is None):
        found = model(x)
    for handle in handles:
        handle.remove()
    assert written and all(out is None for out in written)
    assert_same([t.detach() for t in tensors(found)], list(tensors(expected)))
