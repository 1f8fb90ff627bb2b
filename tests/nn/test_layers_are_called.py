"""What replaces, changes or observes a layer works, and costs its branch alone the kernel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from polynext_mm.nn import PolyNeXt, PolyNeXtClassifier, ops, plain_ops
from polynext_mm.nn.layers import Branch, DepthwiseConv, LayerNorm
from tests import golden
from tests.helpers import zipped
from tests.helpers.tiny import TINY_ARCH, randomized

NORMS = pytest.mark.parametrize('norm', ['ln', 'bn'])
LAYERS = (nn.Linear, nn.Conv2d, DepthwiseConv, LayerNorm)
KERNELS = ('add_poly_mlp', 'add_poly_conv', 'add_poly_attn')


def tiny(norm='ln', **settings) -> PolyNeXt:
    size = dict(norm_size=(32, 48)) if norm == 'bn' else {}
    return randomized(PolyNeXt(TINY_ARCH, norm=norm, **size, **settings)).double().eval()


def features(model: nn.Module, grad: bool = False) -> list[torch.Tensor]:
    with torch.set_grad_enabled(grad):
        return list(model(golden.image((32, 48), batch=2).double()))


def assert_close(actual, expected, tolerance=1e-11):
    for a, b in zipped(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def differ(actual, expected) -> bool:
    return not torch.equal(actual[-1], expected[-1])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear}


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition('.')
    setattr(model.get_submodule(parent), key, layer)


@pytest.fixture
def kernels(monkeypatch):
    """Count the kernels of branches that run."""
    count = []
    for name in KERNELS:
        kernel = getattr(ops, name)

        def spy(*args, kernel=kernel, **kwargs):
            count.append(kernel)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    return count


# Layers that are replaced


class Adapted(nn.Module):
    """A Linear with a low-rank adapter, as peft's LoRA: zero at first."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.up = nn.Linear(rank, base.out_features, bias=False).to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@NORMS
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_low_rank_adapter_learns_and_counts(norm, with_cp):
    model = tiny(norm, with_cp=with_cp).requires_grad_(False)
    expected = features(model)
    adapted = [Adapted(layer) for layer in linears(model).values()]
    for name, layer in zip(list(linears(model)), adapted):
        replace(model, name, layer)
    assert_close(features(model), expected)
    golden.loss(features(model.train(), grad=True), (32, 48)).backward()
    assert len(adapted) == 28 and all(layer.up.weight.grad.abs().max() > 0 for layer in adapted)
    before = features(model.eval())
    for layer in adapted:
        with torch.no_grad():
            layer.up.weight.normal_()
        assert differ(features(model), before)
        nn.init.zeros_(layer.up.weight)


def test_adapters_of_peft():
    peft = pytest.importorskip('peft')
    model = tiny()
    expected = features(model)
    names = list(linears(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names)).double()
    assert_close(features(adapted), expected)
    golden.loss(features(adapted.train(), grad=True), (32, 48)).backward()
    grads = [p.grad for name, p in adapted.named_parameters() if 'lora_B' in name]
    assert len(grads) == len(names) and all(grad.abs().max() > 0 for grad in grads)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if 'lora_B' in name:
                param.normal_(std=0.01)
    changed = features(adapted.eval())
    assert differ(changed, expected)
    merged = adapted.merge_and_unload()
    assert_close(features(merged), changed)
    assert_close(features(merged.fuse()), changed, 1e-9)


def test_dynamic_quantization():
    model = PolyNeXtClassifier(TINY_ARCH, num_classes=5).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not linears(quantized)
    image = golden.image((32, 48), batch=2)
    with torch.no_grad():
        found, expected = quantized(image), model(image)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize('name', ['proj_in', 'proj_out', 'norm'])
def test_a_replaced_layer_costs_its_branch_alone_the_kernel(name, kernels):
    model = tiny()
    expected = features(model)
    branches = [m for m in model.modules() if isinstance(m, Branch)]
    assert len(kernels) == len(branches)
    for branch in branches[0], branches[-2]:
        layer = getattr(branch, name)
        kernels.clear()
        setattr(branch, name, nn.Sequential(layer))
        assert_close(features(model), expected)
        assert len(kernels) == len(branches) - 1
        setattr(branch, name, layer)
    features(model)
    assert len(kernels) == 2 * len(branches) - 1


def test_a_linear_layer_with_a_bias_is_not_taken_for_one_without(kernels):
    model = tiny()
    expected = features(model)
    mlp = model.cells()[0].stacks[0].mlp
    biased = nn.Linear(mlp.proj_out.in_features, mlp.proj_out.out_features).double()
    with torch.no_grad():
        biased.weight.copy_(mlp.proj_out.weight)
    mlp.proj_out = biased
    assert differ(features(model), expected)


def test_the_norm_of_a_cell_can_be_replaced():
    model = tiny()
    expected = features(model)
    cell = model.cells()[-1]
    cell.norm = nn.Sequential(cell.norm)
    assert_close(features(model), expected)
    cell.norm.append(nn.Identity()).append(nn.LayerNorm(cell.scale0.numel()).double())
    assert differ(features(model), expected)


# Weights that are computed


def test_pruning_holds_while_weights_are_trained():
    model = tiny().train()
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, DepthwiseConv))]
    for layer in layers:
        prune.l1_unstructured(layer, 'weight', amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        golden.loss(features(model, grad=True), (32, 48)).backward()
        assert all(layer.weight_orig.grad.abs().max() > 0 for layer in layers)
        optimizer.step()
    expected = features(model.eval())
    for layer in layers:
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        prune.remove(layer, 'weight')
    assert_close(features(model), expected)


@NORMS
def test_parametrized_weights(norm):
    model = tiny(norm)
    expected = features(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, DepthwiseConv))]
    for layer in layers:
        parametrizations.weight_norm(layer)
    assert_close(features(model), expected, 1e-9)
    golden.loss(features(model, grad=True), (32, 48)).backward()
    for layer in layers:
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())
    with torch.no_grad():
        layers[0].parametrizations.weight.original0.mul_(2)
    assert differ(features(model), expected)
    for layer in layers:
        parametrize.remove_parametrizations(layer, 'weight')
    features(model)


def test_fusing_refuses_what_it_cannot_fold_and_leaves_the_network_alone():
    model = tiny()
    layer = model.cells()[-1].stacks[0].mlp.proj_out
    parametrizations.weight_norm(layer)
    expected = features(model)
    message = r'stages.3.cells.0.stacks.0.mlp.proj_out was replaced or has hooks: merge adapters'
    with pytest.raises(ValueError, match=message):
        model.fuse()
    assert_close(features(model), expected)
    parametrize.remove_parametrizations(layer, 'weight')
    assert_close(features(model.fuse()), expected, 1e-9)


# Observers


@NORMS
@pytest.mark.parametrize('grad', [False, True], ids=['inference', 'training'])
def test_forward_hooks_on_every_layer_see_maps_that_stay(norm, grad):
    model = tiny(norm)
    expected = features(model)
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = [(t, t.detach().clone()) for t in (args[0], output)]

        return hook

    layers = {n: m for n, m in model.named_modules() if n and not list(m.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(keep(name))
    assert_close(features(model, grad), expected)
    assert set(seen) == set(layers)
    assert all(torch.equal(t, copy) for maps in seen.values() for t, copy in maps)


@pytest.mark.parametrize('kind', LAYERS)
def test_maps_that_a_hook_keeps_stay_when_other_branches_run_in_place(kind):
    model = tiny()
    layers = [m for m in model.modules() if isinstance(m, kind)]
    kept = []
    for layer in layers:
        kept.clear()
        handle = layer.register_forward_hook(
            lambda m, args, y: kept.extend((t, t.clone()) for t in (args[0], y))
        )
        features(model)
        handle.remove()
        assert len(kept) == 2 and all(torch.equal(t, copy) for t, copy in kept)


@pytest.mark.parametrize(
    'register',
    ['register_forward_pre_hook', 'register_full_backward_hook', 'register_full_backward_pre_hook'],
)
def test_other_hooks_on_every_layer_fire(register):
    model = tiny().train()
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    fired = set()
    for layer in layers:
        getattr(layer, register)(lambda module, *_: fired.add(module))
    golden.loss(features(model, grad=True), (32, 48)).backward()
    assert fired == set(layers)


def test_hooks_on_all_modules_fire_and_are_forgotten(kernels):
    model, seen = tiny(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    features(model)
    handle.remove()
    assert seen >= {m for m in model.modules() if isinstance(m, LAYERS)} and not kernels
    features(model)
    assert kernels


def test_a_patched_forward_is_called():
    """As accelerate's hooks patch it."""
    model, calls = tiny(), []
    for layer in linears(model).values():
        forward = layer.forward
        layer.forward = lambda x, forward=forward: calls.append(1) or forward(x)
    features(model)
    assert len(calls) == len(linears(model))


def test_copies_are_independent(kernels):
    model = tiny()
    copied = copy.deepcopy(model)
    for layer in linears(model).values():
        layer.register_forward_hook(lambda *_: None)
    features(model)
    assert not kernels
    features(copied)
    assert kernels


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_called_layers_under_autocast_round_as_kernels_do(dtype):
    image = golden.image((32, 48), batch=2)
    model = tiny().float()
    exact = model(image)
    with torch.autocast('cpu', dtype):
        kernel = model(image)
        with plain_ops():
            called = model(image)
    for a, b, c in zip(called, kernel, exact):
        assert a.dtype is b.dtype
        assert (a - c).norm() < 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()
