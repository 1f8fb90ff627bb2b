"""Tests of the Triton kernels of the branches under Triton's interpreter, without a GPU.

test_kernels_in_triton.py runs this file in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before Triton is imported.
"""

import pytest
import torch
import triton_interpreter
from torch.utils._python_dispatch import TorchDispatchMode

import op_cases
from polynext_mm.nn import plain_ops

# relative, of a norm
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize('dtype', ERRORS, ids=str)
CASES = {
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


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@every_case
@dtypes
@pytest.mark.parametrize('keep', [False, True], ids=['kept', 'dropped'])
@pytest.mark.parametrize('size', [(1, 1), (3, 17), (40, 33)], ids=str)
def test_values_and_gradients(make, dtype, keep, size):
    op, inputs = make(torch.float32, keep, height=size[0], width=size[1])
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with plain_ops():
        expected = run(op, [t.detach().double().requires_grad_() for t in inputs])
    with Recorder() as recorder:
        actual = run(op, inputs)
    assert recorder.names == CASES[make]
    tolerance = ERRORS[dtype] * (4 if make.__name__.startswith('poly') else 1)
    assert_close(actual, expected, tolerance)
    with torch.no_grad():
        assert_close([op(*inputs)], expected[:1], tolerance)
