"""AutocastOptimWrapper."""

import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from polynext_mm.compat import torch_features
from polynext_mm.compat.torch_features import FLOAT16_ON_CPUS
from polynext_mm.engine import AutocastOptimWrapper
from tests.helpers.networks import build
from tests.helpers.tiny import randomized
from tests.marks import needs


def wrapper_of(model, fused=None, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    return OPTIM_WRAPPERS.build(
        dict(type='AutocastOptimWrapper', **settings), default_args=dict(optimizer=optimizer)
    )


def step(model, wrapper, x):
    with wrapper.optim_context(model):
        outs = model(x)
        loss = sum(out.square().mean() for out in outs)
    wrapper.update_params(loss)
    return outs


FUSED = pytest.mark.parametrize('fused', [None, True], ids=['foreach', 'fused'])


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('dtype', ['fp16', 'half', torch.bfloat16, None])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match="'bfloat16', 'float16', 'float32'"):
        wrapper_of(build(), dtype=dtype)


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [('bfloat16', torch.bfloat16), ('float16', torch.float16), ('float32', torch.float32)],
)
def test_products_run_in_the_type(x, dtype, expected):
    model, dtypes = build(), []
    model.stem.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    step(model, wrapper_of(model, dtype=dtype), x)
    assert dtypes == [expected]
    model(x)  # outside the context, as in evaluation
    assert dtypes[1] is torch.float32


def test_bfloat16_is_float32_where_it_is_slower(x, monkeypatch):
    monkeypatch.setattr(torch_features, 'has_fast_bfloat16', lambda: False)
    model = build()
    wrapper = wrapper_of(model)
    assert wrapper.cast_dtype is torch.float32
    assert {out.dtype for out in step(model, wrapper, x)} == {torch.float32}


def test_bfloat16_is_the_default_and_is_not_scaled(x):
    model = build()
    wrapper = wrapper_of(model)
    assert wrapper.cast_dtype is torch.bfloat16
    wrapper.initialize_count_status(model, 0, 2)
    wrapper.backward(torch.ones((), requires_grad=True) * model.stem.weight.sum())
    assert (model.stem.weight.grad == 1).all()
    assert 'loss_scaler' not in wrapper.state_dict()


def test_float32_steps_as_mms_own_wrapper_does(x):
    runs = []
    for kind in (AutocastOptimWrapper, OptimWrapper):
        model = randomized(build())
        options = dict(dtype='float32') if kind is AutocastOptimWrapper else {}
        wrapper = kind(
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            accumulative_counts=2,
            clip_grad=dict(max_norm=0.1),
            **options,
        )
        wrapper.initialize_count_status(model, 0, 4)
        for _ in range(4):
            step(model, wrapper, x)
        runs.append(model.state_dict())
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


@needs(FLOAT16_ON_CPUS)
@FUSED
def test_float16_scales_unscales_and_clips(x, fused):
    model = randomized(build())
    wrapper = wrapper_of(
        model, fused, dtype='float16', clip_grad=dict(max_norm=1e-3), loss_scale=1024.0
    )
    grads = []
    model.stem.weight.register_hook(lambda grad: grads.append(grad.norm()))
    applied = []
    wrapper.optimizer.register_step_pre_hook(
        lambda optimizer, *_: applied.append(
            torch.stack(
                [p.grad.norm() for group in optimizer.param_groups for p in group['params']]
            ).norm()
        )
    )
    step(model, wrapper, x)
    assert applied[0] == pytest.approx(1e-3, rel=1e-2)
    assert grads[0] > 1  # still scaled
    logged = wrapper.message_hub.get_scalar('train/grad_norm').current()
    assert grads[0] / 1024 < logged < math.inf  # of all gradients, unscaled, before clipping


@needs(FLOAT16_ON_CPUS)
@FUSED
def test_float16_skips_what_overflows_and_lowers_the_scale(x, fused):
    model = randomized(build())
    wrapper = wrapper_of(model, fused, dtype='float16', loss_scale=2.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, wrapper, x * float('inf'))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert wrapper.loss_scaler.get_scale() == 1.0


@needs(FLOAT16_ON_CPUS)
def test_the_state_goes_round_with_the_scale(x, tmp_path):
    model = randomized(build())
    wrapper = wrapper_of(model, dtype='float16', loss_scale=512.0)
    step(model, wrapper, x)
    torch.save(wrapper.state_dict(), tmp_path / 'state.pth')
    state = torch.load(tmp_path / 'state.pth', weights_only=True)
    resumed = wrapper_of(model, dtype='float16', loss_scale=2.0)
    resumed.load_state_dict(state)
    assert 'loss_scaler' in state
    assert resumed.loss_scaler.get_scale() == 512.0
    steps = {int(s['step']) for s in resumed.optimizer.state.values()}
    assert steps == {1}
    for other in ('bfloat16', 'float32'):  # training may continue in another precision
        wrapper_of(model, dtype=other).load_state_dict(state)


@needs(FLOAT16_ON_CPUS)
def test_a_resumed_scale_reaches_the_per_cell_clip(x):
    model = randomized(build(grad_clip_norm=5.0))
    wrapper = wrapper_of(model, dtype='float16', loss_scale=512.0, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    with wrapper.optim_context(model):
        assert model.loss_scale == 256.0
    saved = wrapper_of(model, dtype='float16', loss_scale=64.0)
    wrapper.load_state_dict(saved.state_dict())
    with wrapper.optim_context(model):
        assert model.loss_scale == 32.0
