"""Tests of the Triton kernels of the branches under Triton's interpreter, without a GPU.

test_kernels_in_triton.py runs this file in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before Triton is imported. Of each kind, what is not slow has one case.
"""

import pytest
import torch

from polynext_mm.nn import PolyNeXt, ops, plain_ops, triton_ops
from polynext_mm.nn.ops import norms_triton
from tests import golden, op_cases
from tests.helpers import zipped
from tests.helpers.tiny import TINY_ARCH, TWO_STAGES, Operators, randomized
from tests.nn.ops import triton_interpreter

CASES = {
    op_cases.layer_norm: {'add_norm_triton', 'add_norm_backward_triton'},
    op_cases.norm_of_pair: {'norm_of_sum_triton', 'norm_of_sum_backward_triton'},
    op_cases.poly_mlp: {'norm_of_product_triton', 'norm_of_product_backward_triton'},
    op_cases.poly_mlp_without_norm_weight: {
        'norm_of_product_triton',
        'norm_of_product_backward_triton',
    },
    op_cases.poly_conv: {
        'convolve_triton',
        'depthwise_weight_grad_triton',
        'times_swapped_triton',
        'times_swapped_backward_triton',
        'add_norm_triton',
        'add_norm_backward_triton',
    },
    op_cases.depthwise: {'depthwise', 'depthwise_backward'},  # which call the kernels
}
CASES[op_cases.poly_conv_even] = CASES[op_cases.poly_conv]
SLOW = pytest.mark.slow
every_case = pytest.mark.parametrize('make', CASES, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    triton_interpreter.mend(monkeypatch)


def run(op, inputs):
    """The output and the gradient of every input."""
    out = op(*inputs)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def exact(op, inputs):
    with plain_ops():
        return run(op, [t.detach().double().requires_grad_() for t in inputs])


def errors(actual, expected):
    """Relative errors, as of norms; of gradients that vanish, relative to the largest."""
    least = 1e-6 * max(b.norm() for b in expected)
    return [
        ((a.double() - b).norm() / b.norm().clamp_min(least)).item()
        for a, b in zipped(actual, expected)
    ]


@every_case
@pytest.mark.parametrize('keep', [pytest.param(False, marks=SLOW), True], ids=['kept', 'dropped'])
@pytest.mark.parametrize('size', [pytest.param((1, 1), marks=SLOW), (3, 17)], ids=str)
def test_values_and_gradients(make, keep, size):
    op, inputs = make(torch.float32, keep, height=size[0], width=size[1])
    with Operators() as called:
        actual = run(op, inputs)
    assert set(called.names) == CASES[make]
    assert max(errors(actual, exact(op, inputs))) < 1e-5
    with torch.no_grad():
        assert max(errors([op(*inputs)], actual[:1])) < 1e-6


@every_case
@pytest.mark.parametrize(
    'autocast', [False, pytest.param(True, marks=SLOW)], ids=['inputs', 'autocast']
)
@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)], ids=str
)
def test_in_half_precision_they_round_no_more_than_torch_does(make, dtype, autocast):
    op, inputs = make(torch.float32, True, height=9, width=14)
    if not autocast:
        inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    expected, found = exact(op, inputs), []
    for enabled in (True, False):
        with triton_ops(enabled), torch.autocast('cpu', dtype, enabled=autocast):
            actual = run(op, inputs)
        assert [t.dtype for t in actual[1:]] == [t.dtype for t in inputs]
        found.append(errors(actual, expected))
    eps = torch.finfo(dtype).eps
    assert all(ours < 1.2 * theirs + 2 * eps for ours, theirs in zip(*found)), found


def test_several_blocks_of_places_and_channels_and_turns_of_a_program(monkeypatch):
    """Of maps wider than a block, with channels that are no multiple of eight."""
    monkeypatch.setattr(norms_triton, 'MAX_PROGRAMS', 3)
    monkeypatch.setattr(norms_triton, 'TILE', 256)
    for op, inputs in op_cases.of_width(84, torch.float32, height=2, width=30):
        assert max(errors(run(op, inputs), exact(op, inputs))) < 1e-5


@pytest.mark.parametrize(
    'make',
    [make for make in CASES if make is not op_cases.depthwise],  # the kernels of which are not seen
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize(
    'in_forward', [pytest.param(True, marks=SLOW), False], ids=['in forward', 'in backward']
)
def test_forward_decides_for_backward(make, in_forward):
    op, inputs = make(torch.float32, False)
    with Operators() as called:
        with triton_ops(in_forward):
            out = op(*inputs)
        with triton_ops(not in_forward):
            torch.autograd.grad(out.sum(), inputs)
    assert set(called.names) == (CASES[make] if in_forward else set())


def test_forward_decides_for_the_backward_of_a_convolution():
    op, inputs = op_cases.depthwise(torch.float32, False, height=13, width=11)
    out = op(*inputs)
    with triton_ops(False):
        found = torch.autograd.grad(out.sum(), inputs)
    assert all(map(torch.equal, found, torch.autograd.grad(op(*inputs).sum(), inputs)))


@pytest.mark.parametrize(
    ('arch', 'with_cp'),
    [
        (TWO_STAGES, True),
        pytest.param(TINY_ARCH, False, marks=SLOW),
        pytest.param(TINY_ARCH, True, marks=SLOW),
    ],
)
def test_a_network_whose_kernels_hand_on_narrow_copies_and_copies_of_weights(arch, with_cp):
    """Under autocast it rounds no more than torch's operations do, gradients included."""
    image, found = golden.image((32, 48), batch=2), []
    for enabled, autocast in ((True, True), (False, True), (False, False)):
        model = randomized(PolyNeXt(arch, drop_path_rate=0.3, with_cp=with_cp)).train()
        torch.manual_seed(0)
        with triton_ops(enabled), Operators() as called:
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                features = model(image)
            golden.loss(features, (32, 48)).backward()
        assert ('add_branch_triton' in called.names) == enabled
        found.append([*features, *(p.grad for p in model.parameters() if p.grad is not None)])
    ours, theirs, exact = ([t.detach().double() for t in tensors] for tensors in found)
    least = 1e-3 * max(t.norm() for t in exact)
    for a, b, c in zipped(ours, theirs, exact):
        eps = torch.finfo(torch.bfloat16).eps * (c.norm() + least)
        assert (a - c).norm() < 1.5 * (b - c).norm() + 4 * eps


def test_shapes_that_do_not_fit_are_errors():
    x, vector = torch.randn(2, 8, 8, 7), torch.ones(7)
    for op, inputs in (
        (ops.norm_of_pair, (x, x[:, :4, :4], vector, vector, vector)),
        (ops.layer_norm, (x, torch.ones(5))),
        (lambda x, w: ops.depthwise(x, w, 2), (x, torch.randn(14, 1, 5, 5))),
    ):
        with pytest.raises(RuntimeError):
            op(*inputs)


def test_a_weight_of_any_strides():
    x, weight = torch.randn(1, 6, 7, 8), torch.randn(8, 1, 5, 5)
    strided = weight.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    assert torch.equal(ops.depthwise(x, strided, 2), ops.depthwise(x, weight, 2))


def test_maps_of_two_dtypes_are_added_as_torch_does():
    s0, s1, vector = torch.randn(1, 2, 2, 8).bfloat16(), torch.randn(1, 2, 2, 8), torch.ones(8)
    pair = s0, s1, vector.bfloat16(), vector.bfloat16(), vector.bfloat16()
    with triton_ops(False):
        expected = ops.norm_of_pair(*pair)
    torch.testing.assert_close(ops.norm_of_pair(*pair), expected)


def test_what_is_written_into_is_not_taken_for_what_it_was():
    x, *weights = op_cases.poly_conv(torch.float32, False)[1]
    x = x * 1
    squares = x.square().sum()
    with torch.no_grad():
        ops.add_poly_conv(x, None, *weights, out=x)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        squares.backward()


def test_operators_are_well_formed():
    operators = torch.ops.polynext_mm
    x, z, halves = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 32)
    weight, a0, a1, keep = torch.randn(16), torch.randn(16), torch.randn(16), torch.ones(2, 1, 1)
    b, kernel = torch.randn(2, 6, 7, 8), torch.randn(8, 1, 5, 5)
    mean, rstd = operators.add_norm_triton(x, z, keep, weight, torch.empty_like(x), None)
    out, total, *moments = operators.norm_of_sum_triton(x, z, a0, a1, weight, None)
    pair, narrow = (torch.empty_like(x), torch.empty_like(x)), x.bfloat16()
    for name, args in {
        'norm_of_product': (halves, weight),
        'norm_of_product_backward': (x, halves, weight),
        'add_branch': (x, z, keep, torch.empty_like(x), narrow),
        'add_norm': (x, z, keep, weight, torch.empty_like(x), narrow),
        'add_norm_backward': (x, keep, z, mean, rstd, weight, z),
        'norm_of_sum': (x, z, a0, a1, weight, narrow),
        'norm_of_sum_backward': (out, total, *moments, x, z, a0, a1, weight, *pair),
        'convolve': (b, kernel, 2, True, b.clone()),
        'depthwise_weight_grad': (b, b.clone(), 5, 2),
        'times_swapped': (b, b.clone(), torch.empty_like(b)),
        'times_swapped_backward': (b, b.clone(), b.clone()),
    }.items():
        operator = getattr(operators, f'{name}_triton')
        torch.library.opcheck(operator, args, test_utils=('test_schema', 'test_faketensor'))
