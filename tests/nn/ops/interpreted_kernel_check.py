"""The check of the Triton kernels under Triton's interpreter: see test_kernel_check.py."""

import json

import pytest
import torch
import triton
import triton.language as tl

from polynext_mm.nn import kernel_check
from polynext_mm.nn.ops import dispatch, partners_triton
from tests.helpers.networks import build
from tests.helpers.tiny import Operators
from tests.nn.ops import triton_interpreter

CPU = torch.device('cpu')
FAST = {'LN(x)', 'LN(u * v)', "the product of PolyConv's partners"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No other test's cache, and kernels."""
    triton_interpreter.mend(monkeypatch)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    yield
    dispatch.refuse_triton(())


@pytest.fixture
def fast(monkeypatch):
    cases = tuple(case for case in kernel_check.CASES if case.kernel in FAST)
    monkeypatch.setattr(kernel_check, 'CASES', cases)


@triton.jit
def _not_swapped(x_ptr, y_ptr, out_ptr, n_positions, CHANNELS: tl.constexpr, PLACES: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    valid = places < n_positions.to(tl.int64) * CHANNELS
    x = tl.load(x_ptr + places, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + places, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, (x * y).to(out_ptr.dtype.element_ty), mask=valid)


class NoCompiler:
    def __getitem__(self, grid):
        raise RuntimeError('Failed to find C compiler.\nPlease specify via CC')


def test_every_kernel_is_compared_once():
    """Random generators are left alone, and the second time a file is enough."""
    before = torch.get_rng_state()
    with Operators() as called:
        result = kernel_check.check(CPU, [torch.float32])
    assert not result.findings and 'compared with torch in float32' in result.text
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix('polynext_mm::') for name in names if name.startswith('polynext_mm')}
    kernels = {name for name in ours if 'triton' in name}
    assert len(kernels) == 13 and kernels <= set(called.names)
    assert torch.equal(torch.get_rng_state(), before)
    with Operators() as called:
        result = kernel_check.check(CPU, [torch.float32])
    assert not called.names and 'agreed with torch before, in float32' in result.text
    (file,) = kernel_check.folder().iterdir()
    assert json.loads(file.read_text())['triton'] == triton.__version__


@pytest.mark.usefixtures('fast')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_finding(dtype):
    assert not kernel_check.check(CPU, [dtype]).findings


@pytest.mark.usefixtures('fast')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ('kernel', 'reason'),
    [
        (_not_swapped, 'is wrong in {}: its result is off by'),
        (NoCompiler(), 'does not run in {}: RuntimeError: Failed to find C compiler.'),
    ],
    ids=['wrong', 'does not compile'],
)
def test_a_bad_kernel_is_named_and_replaced(kernel, reason, dtype, monkeypatch):
    monkeypatch.setattr(partners_triton, '_times_swapped_kernel', kernel)
    result = kernel_check.check(CPU, [dtype])
    (finding,) = result.findings
    name = "the Triton kernel of the product of PolyConv's partners (partners_triton) "
    assert str(finding).startswith(name + reason.format(str(dtype).partition('.')[2]))
    assert '\n' not in str(finding)
    assert not kernel_check.folder().exists()  # so that it is looked at again
    dispatch.refuse_triton(result.refused())
    with Operators() as called, torch.no_grad():
        build()(torch.randn(1, 3, 32, 32))
    assert 'times_swapped_triton' not in called.names
    assert {'convolve_triton', 'add_norm_triton'} <= set(called.names)


@pytest.mark.usefixtures('fast')
def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    result = kernel_check.check(CPU, [torch.float32])
    assert not result.findings and 'cannot be remembered: ' in result.text


def test_other_kernels_are_compared_anew(monkeypatch):
    """Of another version of this package, torch or Triton."""
    path = kernel_check.record(CPU, torch.float32)[0]
    assert kernel_check.record(CPU, torch.float32)[0] == path
    monkeypatch.setattr(triton, '__version__', '99')
    assert kernel_check.record(CPU, torch.float32)[0] != path
