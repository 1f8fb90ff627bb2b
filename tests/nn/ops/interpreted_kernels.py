"""Tests of the Triton kernels of the branches under Triton's interpreter, without a GPU.

test_kernels_in_triton.py runs this file in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before Triton is imported.
"""

import pytest
import torch
import triton_interpreter
from torch.utils._python_dispatch import TorchDispatchMode

import op_cases
from polynext_mm.nn import plain_ops, triton_ops

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
every_case = pytest.mark.parametrize('make', CASES, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    triton_interpreter.mend(monkeypatch)


class Recorder(TorchDispatchMode):
    """Lists the operators of this package that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'polynext_mm':
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


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
        for a, b in zip(actual, expected, strict=True)
    ]


@every_case
@pytest.mark.parametrize('keep', [False, True], ids=['kept', 'dropped'])
@pytest.mark.parametrize('size', [(1, 1), (3, 17), (40, 33)], ids=str)
def test_values_and_gradients(make, keep, size):
    op, inputs = make(torch.float32, keep, height=size[0], width=size[1])
    with Recorder() as recorder:
        actual = run(op, inputs)
    assert recorder.names == CASES[make]
    assert max(errors(actual, exact(op, inputs))) < 1e-5
    with torch.no_grad():
        assert max(errors([op(*inputs)], actual[:1])) < 1e-6


@every_case
@pytest.mark.parametrize('autocast', [False, True], ids=['inputs', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
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
