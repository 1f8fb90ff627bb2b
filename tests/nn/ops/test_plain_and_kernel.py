"""Every operation with a kernel computes what its plain form computes, in both directions."""

import pytest
import torch

from polynext_mm.nn import ops, plain_ops

HEIGHT, WIDTH = 5, 4


def tensors(dtype, *shapes, seed=0):
    """Leaves of unit scale, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for shape in shapes:
        fan_in = shape[-1] if len(shape) == 2 else shape[-1] ** 2 if len(shape[1:]) == 3 else 1
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        leaves.append((noise / max(fan_in, 1) ** 0.5).to(dtype).requires_grad_())
    return leaves


def maps(dtype, batch, channels, count=1, height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for _ in range(count)
    ]


def keep_of(batch):
    return torch.tensor([0.0, 1.25, 1.25])[:batch].view(-1, 1, 1, 1)


def norm_of_pair(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, count=2, **size) + tensors(dtype, (7,), (7,), (7,))
    return ops.norm_of_pair, inputs


def poly_mlp(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (5,), (7, 5))
    factor = keep_of(2).to(dtype) if keep else None
    return lambda x, *weights: ops.add_poly_mlp(x, factor, *weights), inputs


def poly_mlp_without_norm_weight(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (7, 5))
    factor = keep_of(2).to(dtype) if keep else None
    return lambda x, w_in, w_out: ops.add_poly_mlp(x, factor, w_in, None, w_out), inputs


def poly_conv(dtype, keep, inner=5, coarse=5, **size):
    kernels = [(inner, 1, coarse, coarse), (inner, 1, 3, 3), (inner, 1, 3, 3)]
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (inner, 7), *kernels, (7, inner), (7,))
    factor = keep_of(2).to(dtype) if keep else None
    return lambda x, *weights: ops.add_poly_conv(x, factor, *weights), inputs


def poly_conv_even(dtype, keep, **size):
    return poly_conv(dtype, keep, inner=6, coarse=3, **size)


def poly_attention(dtype, keep, **size):
    tokens = [t.detach().flatten(1, 2).requires_grad_() for t in maps(dtype, 2, 4, 3, **size)]
    return ops.poly_attention, tokens


def poly_attention_sums(dtype, keep, **size):
    tokens = [t.detach().flatten(1, 2).requires_grad_() for t in maps(dtype, 2, 4, 3, **size)]

    def both(q, k, v):
        values, weights = ops.poly_attention_sums(q, k, v)
        return torch.cat((values, weights[..., None]), -1)

    return both, tokens


def channel_batch_norm(dtype, keep, height=HEIGHT, width=WIDTH):
    inputs = maps(dtype, 2, 7, height=height, width=width)
    inputs += tensors(dtype, (height, width), (7,))
    return lambda *tensors: ops.channel_batch_norm(*tensors)[0], inputs


def depthwise(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (7, 1, 5, 5))
    return lambda x, weight: ops.depthwise(x, weight, 2), inputs


OPS = [
    norm_of_pair,
    poly_mlp,
    poly_mlp_without_norm_weight,
    poly_conv,
    poly_conv_even,
    poly_attention,
    poly_attention_sums,
    channel_batch_norm,
    depthwise,
]
every_op = pytest.mark.parametrize('make', OPS, ids=lambda make: make.__name__)
with_and_without_keep = pytest.mark.parametrize('keep', [False, True], ids=['kept', 'dropped'])


def run(op, inputs, plain):
    """The output, and the gradient of every input."""
    with plain_ops(plain):
        out = op(*inputs)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def assert_equal(actual, expected, tolerance=1e-13):
    for a, b in zip(actual, expected, strict=True):
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
    'make', [norm_of_pair, poly_mlp, poly_conv], ids=lambda make: make.__name__
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
