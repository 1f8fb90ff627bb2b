"""Every operation on the device, against its plain form on the CPU in float64."""

import pytest
import torch

from polynext_mm.nn import plain_ops, poly_attention, triton_ops
from tests import op_cases
from tests.helpers import zipped
from tests.op_cases import OPS

# Of a vector's length. Half precision rounds in several places.
TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
}
precisions = pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
# The parameters of norms are float32 in every network, and gradients of undivided sums are beyond
# float16's numbers.
NEVER = {
    ('channel_batch_norm', torch.bfloat16),
    ('channel_batch_norm', torch.float16),
    ('poly_attention_sums', torch.float16),
}
CASES = [
    pytest.param(make, dtype, id=f'{make.__name__}-{dtype}')
    for make in OPS
    for dtype in TOLERANCE
    if (make.__name__, dtype) not in NEVER
]


def run(op, inputs):
    """The output and the gradient of every input."""
    out = op(*inputs)
    # a fraction of float16's numbers
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, cotangent.to(out))]


def assert_close(actual, expected, tolerance):
    largest = max(b.norm() for b in expected)
    for i, (a, b) in enumerate(zipped(actual, expected)):
        length = b.norm() if b.norm() > 1e-10 * largest else largest  # of what is only rounding
        off = (a.cpu().double() - b).norm() / length
        assert off < tolerance, (i, off.item())


def leaves(inputs, **to):
    return [t.detach().to(**to).requires_grad_() for t in inputs]


def check(op, inputs, device, dtype, slack=1):
    inputs = leaves(inputs, dtype=dtype)
    with plain_ops():
        expected = run(op, leaves(inputs, dtype=torch.float64))
    actual = run(op, leaves(inputs, device=device))
    assert_close(actual, expected, slack * TOLERANCE[dtype])
    with torch.no_grad():
        assert_close([op(*leaves(inputs, device=device))], expected[:1], slack * TOLERANCE[dtype])


@pytest.mark.parametrize('keep', [False, True], ids=['kept', 'dropped'])
@pytest.mark.parametrize(('make', 'dtype'), CASES)
def test_every_operation(make, keep, dtype, device):
    op, inputs = make(torch.float64, keep, height=9, width=14)
    check(op, inputs, device, dtype)


@precisions
@pytest.mark.parametrize('channels', [84, 128])
def test_operations_at_widths_of_networks(channels, dtype, device):
    """Where programs have several blocks, and loads several channels.

    Torch's own gradients on the CPU are .066 off in bfloat16, by sums over this many positions.
    """
    for op, inputs in op_cases.of_width(channels, torch.float64, height=30, width=33):
        check(op, inputs, device, dtype, slack=2)


@precisions
@pytest.mark.parametrize('triton', [True, False], ids=['Triton', 'torch'])
@pytest.mark.parametrize('tokens', [17, 196, 1050])
def test_attention(tokens, triton, dtype, device):
    """With heads as in a network, of which Triton's kernels take the width."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, tokens, 3, 5, 32)  # the views of a map, with strides
    q, k, v = torch.randn(shape, generator=generator).double().transpose(1, 3).unbind(2)
    with triton_ops(triton):
        check(poly_attention, [q * 32**-0.5, k, v], device, dtype)


def test_float16_scores_in_the_hundreds(device):
    """Their fourth powers are beyond float16's numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 65, 32, generator=generator) for _ in 'qkv')
    q = (8 * q).half()
    with plain_ops():
        expected = poly_attention(q.double(), k.half().double(), v.half().double())
    actual = poly_attention(*(t.half().to(device) for t in (q, k, v)))
    assert_close([actual], [expected], TOLERANCE[torch.float16])


def test_memory_of_attention_is_linear_in_tokens(cuda):
    peaks = []
    for tokens in (4096, 8192, 16384):
        inputs = [torch.randn(1, 5, tokens, 32, device='cuda') for _ in 'qkv']
        run(poly_attention, leaves(inputs))  # tunes the kernels
        inputs = leaves(inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(poly_attention(*inputs).sum(), inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for smaller, larger in zip(peaks, peaks[1:]):
        assert larger < 2.2 * smaller, peaks
