"""The Triton kernels of polynomial attention without a GPU: interpreted, compiled, or not there."""

import contextlib
import importlib
import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from polynext_mm.compat.torch_features import TRITON_KERNELS
from polynext_mm.nn import poly_attention, triton_ops
from tests.helpers.programs import script
from tests.helpers.tiny import Operators
from tests.marks import require

require(TRITON_KERNELS)
triton = pytest.importorskip('triton')
kernels = importlib.import_module('polynext_mm.nn.ops.poly_attention_triton')

TRITON, TORCH = 'poly_attention_triton', 'poly_attention'


# Which operator a device is given, on tensors without memory


@pytest.fixture
def fake_cuda():
    with FakeTensorMode():
        yield


def operator_of(**inputs) -> str:
    """The operator that computes attention of inputs such as these."""
    settings = dict(dtype=torch.float32, device='cuda', width=32) | inputs
    q = torch.empty(2, 3, 20, settings.pop('width'), **settings)
    with Operators() as called:
        poly_attention(q, q, q)
    (name,) = called.names
    return name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_is_given_the_kernels(dtype, fake_cuda):
    assert operator_of(dtype=dtype) == TRITON


@pytest.mark.parametrize(
    'inputs', [dict(device='cpu'), dict(dtype=torch.float64), dict(width=24), dict(width=128)]
)
def test_what_the_kernels_do_not_take_is_computed_in_blocks(inputs, fake_cuda):
    assert operator_of(**inputs) == TORCH


def test_triton_can_be_turned_off(fake_cuda):
    with triton_ops(False):
        assert operator_of() == TORCH
        with triton_ops(True):
            assert operator_of() == TRITON
        assert operator_of() == TORCH
    assert operator_of() == TRITON


@pytest.mark.parametrize('major, name', [(7, TORCH), (8, TRITON), (12, TRITON)])
def test_devices_older_than_triton_supports(major, name, fake_cuda, monkeypatch):
    class Properties:
        def __init__(self, device):
            self.major = major

    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', Properties)
    assert operator_of() == name


def test_the_result_is_laid_out_as_a_map(fake_cuda):
    q, k, v = (torch.empty(2, 4, 6, 3 * 32, device='cuda') for _ in range(3))
    q, k, v = (t.view(2, 24, 3, 32).transpose(1, 2) for t in (q, k, v))
    assert poly_attention(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    'q, k, v',
    [
        ((2, 3, 20, 32), (1, 3, 20, 32), (1, 3, 20, 32)),
        ((2, 3, 20, 32), (2, 3, 20, 32), (2, 3, 21, 32)),
        ((2, 3, 20, 32), (2, 3, 20, 16), (2, 3, 20, 32)),
    ],
)
def test_shapes_must_fit_together(q, k, v, fake_cuda):
    with pytest.raises(ValueError, match='q, k and v have shapes'):
        poly_attention(*(torch.empty(shape, device='cuda') for shape in (q, k, v)))


def test_operations_are_counted(fake_cuda):
    q = torch.empty(2, 3, 20, 32, device='cuda')
    k = v = torch.empty(2, 3, 30, 32, device='cuda')
    with FlopCounterMode(display=False) as counter:
        poly_attention(q, k, v)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 20 * 30 * 32)


def test_compiles_into_one_graph(fake_cuda):
    compiled = torch.compile(poly_attention, backend='eager', fullgraph=True)
    q = torch.empty(2, 3, 20, 32, device='cuda')
    assert compiled(q, q, q).stride() == poly_attention(q, q, q).stride()
    torch._dynamo.reset()


# The precision of float32 products


@contextlib.contextmanager
def restored_precision():
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_is_taken_only_where_torch_allows_it(monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    with restored_precision():
        assert not kernels.tf32_allowed()
        torch.set_float32_matmul_precision('high')
        assert kernels.tf32_allowed()
        torch.backends.cuda.matmul.allow_tf32 = False
        assert not kernels.tf32_allowed()
        torch.backends.cuda.matmul.allow_tf32 = True
        assert kernels.tf32_allowed()
        monkeypatch.setattr(torch.version, 'hip', '6.4')
        assert not kernels.tf32_allowed()


# Compiled for devices that are not there


@pytest.mark.slow
@pytest.mark.parametrize('target, products', [('sm_80', 'mma.sync'), ('sm_90', 'wgmma')])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'tf32'])
def test_compiled_kernels_fit_the_device(dtype, target, products):
    compiler = script('benchmarks/compile_kernels')
    records = compiler.report([compiler.parse_target(target)], [dtype], list(kernels.KERNELS))
    print(compiler.markdown(records))
    for record in records:
        assert record['spilled'] == 0, record
        assert record['shared KiB'] <= 48, record
        assert record['products'] == ('scalar' if dtype == 'float32' else products), record


@pytest.mark.slow
@pytest.mark.parametrize('target', ['gfx90a', 'gfx942'])
@pytest.mark.parametrize('kernel', kernels.KERNELS)
def test_compiled_kernels_fit_amd_devices(kernel, target):
    compiler = script('benchmarks/compile_kernels')
    for dtype in ('bfloat16', 'float16'):
        tile = kernels.TILES[kernel]['half'][0]
        record = compiler.usage(kernel, dtype, tile, compiler.parse_target(target))
        assert record['spilled'] == 0, record
        assert record['shared KiB'] <= 64, record
        assert record['products'] == 'mfma', record


# Launched on a device that does nothing: compiled for what the inputs are, and not run


class Driver:
    """All that Triton asks of a driver before it launches a kernel, or measures one."""

    def get_current_target(self):
        return importlib.import_module('triton.backends.compiler').GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        return lambda call, quantiles: [call() or 1.0] * 3


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Lists the kernels launched, with their tiles."""
    calls, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **settings):
        run(self, *args, grid=grid, warmup=True, **settings)
        (name,) = (name for name, kernel in kernels.KERNELS.items() if kernel is self)
        calls.append((name, (settings['BLOCK_Q'], settings['BLOCK_K'], settings['num_warps'])))

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # of choices, too: these are no good ones
    monkeypatch.setattr(triton.JITFunction, 'run', compile_only)
    monkeypatch.setattr(triton.runtime.driver, '_active', Driver())
    forget_compiled()
    yield calls
    forget_compiled()


def forget_compiled():
    kernels._tuned.cache_clear()
    for kernel in kernels.KERNELS.values():
        kernel.device_caches.clear()


def launch(queries, keys, heads):
    """Forward and backward, with strides that are odd, one and zero."""
    dtype = torch.bfloat16
    q = torch.randn(2, queries, 2 * heads * 32, dtype=dtype)[..., : heads * 32].unflatten(
        -1, (heads, 32)
    )
    k = torch.randn(2 * keys * heads + 31, dtype=dtype)
    k = k.as_strided((2, keys, heads, 32), (keys * heads, heads, 1, 1))
    v = torch.randn(2, 1, heads, 32, dtype=dtype).expand(2, keys, heads, 32)
    maps = [q, k, v]
    ops = torch.ops.polynext_mm
    out, factor = ops.poly_attention_triton(*maps, 1e-12)
    ops.poly_attention_triton_backward(torch.ones_like(out), *maps, out, factor)


@pytest.mark.slow
def test_every_tile_is_measured_once(launched):
    tiles = [
        (name, (tile.queries, tile.keys, tile.warps))
        for name, kinds in kernels.TILES.items()
        for tile in (*kinds['half'], kinds['half'][0])  # which is as fast as any here
    ]
    launch(20, 33, heads=1)
    assert launched == tiles
    launched.clear()
    launch(20, 33, heads=1)  # known
    assert launched == tiles[3::4]
    launched.clear()
    launch(200, 330, heads=5)
    assert launched == tiles
    if 'cache_results' in inspect.signature(triton.autotune).parameters:
        forget_compiled()  # as another process, which finds the choice on the disk
        launched.clear()
        launch(20, 33, heads=1)
        assert launched == tiles[3::4]


@pytest.mark.slow
def test_no_tile_is_measured_where_results_must_repeat(launched):
    torch.use_deterministic_algorithms(True)
    try:
        launch(20, 33, heads=2)
    finally:
        torch.use_deterministic_algorithms(False)
    first = [(name, kinds['half'][0]) for name, kinds in kernels.TILES.items()]
    assert launched == [(name, (tile.queries, tile.keys, tile.warps)) for name, tile in first]
