"""The Triton kernels of the branches without a GPU: interpreted, compiled, chosen or not."""

from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from polynext_mm.compat.torch_features import TRITON_KERNELS
from polynext_mm.nn import PolyNeXt, ops, plain_ops, triton_ops
from tests.helpers.programs import python, script
from tests.helpers.tiny import Operators
from tests.marks import require
from tests.op_cases import layer_norm, norm_of_pair, poly_conv, poly_mlp

require(TRITON_KERNELS)
pytest.importorskip('triton')


@pytest.mark.heavy
@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(which):
    programs = [
        Path(__file__).with_name(f'interpreted_{name}.py') for name in ('kernels', 'poly_attention')
    ]
    python('-m', 'pytest', '-x', '-m', which, *programs, TRITON_INTERPRET='1')


def operators_of(op, inputs, dtype=torch.float32, device='cuda') -> set[str]:
    """The operators of this package that compute an operation, on tensors without memory."""
    with FakeTensorMode(), Operators() as called:
        op(*(torch.empty(t.shape, dtype=dtype, device=device) for t in inputs))
    return set(called.names)


FORWARD = {
    layer_norm: {'add_norm_triton'},
    norm_of_pair: {'norm_of_sum_triton'},
    poly_mlp: {'norm_of_product_triton'},
    poly_conv: {'convolve_triton', 'times_swapped_triton', 'add_norm_triton'},
}
every_op = pytest.mark.parametrize('make', FORWARD, ids=lambda make: make.__name__)


@every_op
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_is_given_the_kernels(make, dtype):
    assert operators_of(*make(torch.float32, False), dtype=dtype) == FORWARD[make]


@every_op
def test_other_devices_and_dtypes_are_not(make):
    op, inputs = make(torch.float32, False)
    assert not operators_of(op, inputs, device='cpu')
    assert not operators_of(op, inputs, dtype=torch.float64)


@every_op
def test_they_can_be_turned_off(make):
    op, inputs = make(torch.float32, False)
    for turned_off in (triton_ops(False), plain_ops()):
        with turned_off:
            assert not operators_of(op, inputs)


@pytest.mark.parametrize('size, dilation', [(3, 1), (5, 1), (7, 2)])
def test_convolutions_that_cudnn_is_fast_at_or_that_are_larger_stay_torchs(size, dilation):
    shapes = torch.empty(2, 9, 7, 8), torch.empty(8, 1, size, size)
    assert not operators_of(lambda x, w: ops.depthwise(x, w, dilation), shapes) & {
        'convolve_triton'
    }


def test_a_norm_of_more_channels_than_fit_into_registers_is_torchs():
    shapes = torch.empty(2, 2, 2, 4096), torch.empty(4096)
    assert not operators_of(ops.layer_norm, shapes)


def test_operators_have_the_shapes_dtypes_and_strides_of_their_results():
    """On meta tensors, which a count of operations and a compiler take."""
    image = torch.empty(2, 3, 64, 96, device='meta')
    model = PolyNeXt('apolynext_t').to('meta')
    features = [[], []]
    for enabled, found in zip((True, False), features):
        with triton_ops(enabled):
            outputs = model(image)
        sum(f.mean() for f in outputs).backward()
        found += [(f.shape, f.dtype, f.stride()) for f in outputs]
        found += [(p.grad.shape, p.grad.dtype) for p in model.parameters()]
        model.zero_grad()
    assert features[0] == features[1]


@pytest.mark.heavy
def test_networks_work_where_triton_is_missing():
    python(
        '-c',
        'import sys; sys.modules["triton"] = None\n'
        'import torch\n'
        'from polynext_mm.nn import PolyNeXt, triton_ops\n'
        'with triton_ops(True):\n'
        '    features = PolyNeXt("apolynext_t")(torch.randn(1, 3, 32, 32))\n'
        'sum(f.mean() for f in features).backward()\n'
        'assert all(f.isfinite().all() for f in features)\n',
    )


@pytest.mark.slow
@pytest.mark.parametrize('target', ['sm_80', 'sm_90', 'gfx942'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_compiled_kernels_fit_the_device(dtype, target):
    compiler = script('benchmarks/compile_kernels')
    records = compiler.report([compiler.parse_target(target)], [dtype], list(compiler.BRANCHES))
    print(compiler.markdown(records))
    for record in records:
        assert record['spilled'] == 0, record
        assert record['shared KiB'] <= 48, record
