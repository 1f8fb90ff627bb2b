"""Every operation with a kernel computes what its plain form computes, in both directions."""

import pytest
import torch

from polynext_mm.nn import plain_ops
from tests.helpers import zipped
from tests.op_cases import OPS, channel_batch_norm, norm_of_pair, poly_attn, poly_conv, poly_mlp

every_op = pytest.mark.parametrize('make', OPS, ids=lambda make: make.__name__)
with_and_without_keep = pytest.mark.parametrize('keep', [False, True], ids=['kept', 'dropped'])


def run(op, inputs, plain):
    """The output, and the gradient of every input."""
    with plain_ops(plain):
        out = op(*inputs)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def assert_equal(actual, expected, tolerance=1e-13):
    for a, b in zipped(actual, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@every_op
@with_and_without_keep
@pytest.mark.parametrize('size', [{}, dict(height=1, width=1), dict(height=1, width=9)])
def test_forward_and_every_gradient(make, keep, size):
    op, inputs = make(torch.float64, keep, **size)
    expected = run(op, inputs, plain=True)
    assert_equal(run(op, inputs, plain=False), expected)
    with torch.no_grad():
        assert_equal([op(*inputs)], expected[:1])


@every_op
@with_and_without_keep
def test_gradcheck(make, keep):
    op, inputs = make(torch.float64, keep, height=3, width=2)
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize(
    'make', [norm_of_pair, poly_mlp, poly_conv, poly_attn], ids=lambda make: make.__name__
)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_costs_no_more_precision_than_in_the_plain_form(make, dtype):
    op, inputs = make(torch.float32, True)
    exact = run(op, [t.detach().double().requires_grad_() for t in inputs], plain=True)
    with torch.autocast('cpu', dtype):
        kernel, plain = run(op, inputs, plain=False), run(op, inputs, plain=True)
    eps = torch.finfo(dtype).eps
    for a, b, c in zip(kernel, plain, exact):
        assert a.dtype is b.dtype is torch.float32
        assert (a - c).norm() <= 1.5 * (b - c).norm() + eps * c.norm()


@every_op
def test_inputs_of_any_strides(make):
    op, inputs = make(torch.float64, True)
    scattered = [torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_() for t in inputs]
    assert not all(t.is_contiguous() for t in scattered)
    expected = run(op, inputs, plain=True)
    assert_equal(run(op, scattered, plain=False), expected)
    with torch.no_grad():
        assert_equal([op(*scattered)], expected[:1])


@every_op
def test_a_gradient_of_any_strides(make):
    op, inputs = make(torch.float64, True)
    expanded = []
    for plain in (False, True):
        with plain_ops(plain):
            expanded.append(torch.autograd.grad(op(*inputs).sum(), inputs))
    assert_equal(*expanded)


@every_op
def test_some_inputs_need_no_gradient(make):
    """Of a frozen layer, or of the image."""
    op, inputs = make(torch.float64, True)
    expected = run(op, inputs, plain=True)[1:]
    for i, leaf in enumerate(inputs):
        others = [t if t is leaf else t.detach() for t in inputs]
        out = op(*others)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
        assert_equal([grad], [expected[i]])


@pytest.mark.parametrize(
    'make',
    [make for make in OPS if make is not channel_batch_norm],  # no batch, no statistics
    ids=lambda make: make.__name__,
)
def test_an_empty_batch(make):
    op, inputs = make(torch.float64, False)
    empty = [t.detach()[:0].requires_grad_() if t.ndim > 2 and len(t) == 2 else t for t in inputs]
    assert_equal(run(op, empty, plain=False), run(op, empty, plain=True))


@every_op
def test_arguments_are_left_alone(make):
    op, inputs = make(torch.float64, True)
    before = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        out = op(*inputs)
        out.zero_()
    assert all(torch.equal(t, b) for t, b in zip(inputs, before))


def test_the_choice_is_for_all_operations_and_is_taken_back():
    op, inputs = poly_conv(torch.float64, False)
    assert 'Kernel' in op(*inputs).grad_fn.name()
    with plain_ops():
        assert 'Kernel' not in op(*inputs).grad_fn.name()
        with plain_ops(False):
            assert 'Kernel' in op(*inputs).grad_fn.name()
        with pytest.raises(KeyError), plain_ops():
            raise KeyError
        assert 'Kernel' not in op(*inputs).grad_fn.name()
    assert 'Kernel' in op(*inputs).grad_fn.name()
