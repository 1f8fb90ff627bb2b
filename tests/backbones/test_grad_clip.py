"""The per-cell gradient clip of the A recipe, also under loss scaling and accumulation."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from polynext_mm.compat.torch_features import FLOAT16_ON_CPUS
from polynext_mm.engine import AutocastOptimWrapper, TrainingCheckHook
from tests.helpers.configs import TINY_NETWORK, config_to_load_into
from tests.helpers.networks import build
from tests.helpers.samples import ade20k_scenes
from tests.helpers.tiny import randomized
from tests.marks import needs

MAX_NORM = 0.85


def loss_of(model, x):
    return sum((f.float() * (i + 1)).square().mean() for i, f in enumerate(model(x)))


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters()}


def plainly_clipped(x, max_norm):
    """Return gradients clipped by hooks as published, and the norms before clipping."""
    model, norms = randomized(build()), []

    def clip(grad):
        norm = grad.norm()
        norms.append(norm.item())
        return grad * max_norm / (norm + 1e-6) if norm > max_norm else None

    for cell in model.cells():
        # the hook of a tensor gets the sum of the gradients from all its consumers
        cell.register_forward_hook(lambda cell, inputs, out: out.register_hook(clip) and None)
    loss_of(model, x).backward()
    return gradients(model), norms


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_close(ours, expected, factor=1.0):
    for name, grad in expected.items():
        assert (ours[name] / factor - grad).norm() < 1e-5 * grad.norm(), name


@pytest.mark.parametrize('with_cp', [False, True])
def test_the_gradient_at_every_cells_output_is_clipped(x, with_cp):
    expected, norms = plainly_clipped(x, MAX_NORM)
    assert min(norms) < MAX_NORM < max(norms), 'both cases must be met'
    model = randomized(build(grad_clip_norm=MAX_NORM, with_cp=with_cp))
    loss_of(model, x).backward()
    assert_close(gradients(model), expected)


def test_a_large_norm_clips_nothing(x):
    expected, norms = plainly_clipped(x, 1e6)
    model = randomized(build(grad_clip_norm=1e6))
    loss_of(model, x).backward()
    assert_close(gradients(model), expected)
    clipped, _ = plainly_clipped(x, MAX_NORM)
    assert not torch.allclose(clipped['stem.weight'], expected['stem.weight'])


def scaled_gradients(x, dtype, counts=1):
    """Return gradients after a backward of AutocastOptimWrapper, and the factor on the loss."""
    model = randomized(build(grad_clip_norm=MAX_NORM))
    wrapper = AutocastOptimWrapper(
        torch.optim.SGD(model.parameters(), lr=0.1),
        dtype=dtype,
        loss_scale=1024.0,
        accumulative_counts=counts,
    )
    wrapper.initialize_count_status(model, 0, 2 * counts)
    with wrapper.optim_context(model):
        loss = wrapper.scale_loss(loss_of(model, x))
    wrapper.backward(loss)
    return gradients(model), wrapper.loss_scaler.get_scale() / counts


@pytest.mark.parametrize('counts', [1, 4])
def test_accumulation_is_not_taken_for_small_gradients(x, counts):
    expected, _ = plainly_clipped(x, MAX_NORM)
    grads, factor = scaled_gradients(x, 'float32', counts)
    assert factor == 1 / counts
    assert_close(grads, expected, factor)


@pytest.mark.parametrize(
    ('dtype', 'counts', 'scale'),
    [
        pytest.param('float16', 1, 1024, marks=needs(FLOAT16_ON_CPUS)),
        pytest.param('float16', 4, 256, marks=needs(FLOAT16_ON_CPUS)),
        ('bfloat16', 1, 1),
        ('bfloat16', 4, 0.25),
    ],
)
def test_half_precision_clips_the_unscaled_gradient(x, dtype, counts, scale):
    expected, _ = plainly_clipped(x, MAX_NORM)
    grads, factor = scaled_gradients(x, dtype, counts)
    assert factor == scale
    for name, grad in expected.items():
        off = (grads[name] / factor - grad).norm() / grad.norm()
        assert off < (0.05 if dtype == 'float16' else 0.25), name


def test_gradients_that_overflow_stay_visible(x):
    """The loss scaler has to see them to skip the step."""
    model = randomized(build(grad_clip_norm=MAX_NORM))
    (loss_of(model, x) * float('inf')).backward()
    assert not gradients(model)['stem.weight'].isfinite().all()


# An unknown loss scale is refused


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_without_a_known_loss_scale(x, dtype):
    model = build(grad_clip_norm=5.0)
    with torch.autocast('cpu', dtype):
        with pytest.raises(ValueError, match=r"type='AutocastOptimWrapper'.*set_loss_scale\(1.\)"):
            model(x)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        model.train().set_loss_scale(1.0)
        model(x)
    build(grad_clip_norm=5.0)(x)
    with torch.autocast('cpu', dtype):
        build()(x)


def test_mms_amp_wrapper_is_refused_before_the_first_step():
    wrapper = object.__new__(AmpOptimWrapper)  # its constructor wants a GPU
    wrapper._accumulative_counts = 1
    wrapper.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    runner = SimpleNamespace(
        model=build(grad_clip_norm=5.0),
        optim_wrapper=wrapper,
        world_size=1,
        train_dataloader=DataLoader(range(4), batch_size=2),
        max_iters=1,
    )
    with pytest.raises(ValueError, match="AmpOptimWrapper.*type='AutocastOptimWrapper'"):
        TrainingCheckHook().before_train(runner)
    runner.model = build()
    TrainingCheckHook().before_train(runner)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('clip', 'counts', 'refused'), [(5.0, 2, True), (None, 2, False), (5.0, 1, False)]
)
def test_mms_accumulation_is_refused_before_the_first_step(tmp_path, clip, counts, refused):
    config = config_to_load_into(ade20k_scenes(), tmp_path / 'work', **TINY_NETWORK)
    config.model.backbone.grad_clip_norm = clip
    config.optim_wrapper = dict(
        type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1), accumulative_counts=counts
    )
    runner = Runner.from_cfg(config)
    if refused:
        with pytest.raises(ValueError, match='OptimWrapper with accumulative_counts=2'):
            runner.train()
    assert runner.iter == 0
    if not refused:
        runner.train()
        assert runner.iter == 1
