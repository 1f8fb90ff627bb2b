"""The check of the Triton kernels, what a training makes of it, and how both are turned off."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch._subclasses import FakeTensorMode

from polynext_mm.compat.torch_features import TRITON_KERNELS
from polynext_mm.nn import kernel_check
from polynext_mm.nn.ops import dispatch
from tests import op_cases
from tests.helpers.networks import build
from tests.helpers.programs import python
from tests.helpers.tiny import Operators
from tests.marks import require

require(TRITON_KERNELS)
pytest.importorskip('triton')

OFF = """
import torch
from torch._subclasses import FakeTensorMode
from polynext_mm.nn import kernel_check, ops
from tests.helpers.tiny import Operators
with FakeTensorMode(), Operators() as called:
    ops.layer_norm(torch.empty(2, 3, 4, 8, device='cuda'), torch.empty(8, device='cuda'))
print('CALLED', called.names, kernel_check.available(torch.device('cuda')))
"""


@pytest.mark.slow
def test_the_check_under_the_interpreter():
    program = Path(__file__).parent / 'ops' / 'interpreted_kernel_check.py'
    python('-m', 'pytest', '-x', program, TRITON_INTERPRET='1')


@pytest.mark.heavy
def test_the_environment_turns_kernels_off():
    printed = python('-c', OFF, POLYNEXT_KERNELS='off')
    assert 'CALLED [] False' in printed


def test_a_mode_that_does_not_exist(monkeypatch):
    with pytest.raises(ValueError, match="kernels is 'on': set it to checked, unchecked or off"):
        HOOKS.build(dict(type='KernelCheckHook', kernels='on'))
    monkeypatch.setenv('POLYNEXT_KERNELS', 'no')
    with pytest.raises(ValueError, match="POLYNEXT_KERNELS is 'no': set it to checked"):
        HOOKS.build(dict(type='KernelCheckHook'))


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Of a training on a GPU, on which one kernel is wrong."""
    finding = kernel_check.Finding('LN(x)', 'norms_triton', 'is wrong in bfloat16: its result')
    runner = SimpleNamespace(
        model=build(),
        optim_wrapper=SimpleNamespace(cast_dtype=torch.bfloat16),
        logger=logging.getLogger('a training'),
        log_dir=str(tmp_path),
        checked=[],
    )

    def check(device, dtypes):
        runner.checked.append(dtypes)
        return kernel_check.Result((finding,), 'were compared')

    monkeypatch.setattr(kernel_check, 'available', lambda device: True)
    monkeypatch.setattr(kernel_check, 'check', check)
    yield runner
    dispatch.refuse_triton(())


def operators():
    """The kernels that a GPU would be given in PolyConv."""
    op, inputs = op_cases.poly_conv(torch.float32, False)
    with FakeTensorMode(), Operators() as called:
        op(*(torch.empty(t.shape, device='cuda') for t in inputs))
    return set(called.names)


def test_a_training_goes_on_without_a_wrong_kernel(runner, caplog, tmp_path):
    HOOKS.build(dict(type='KernelCheckHook')).before_train(runner)
    assert runner.checked == [(torch.bfloat16, torch.float32)]
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.startswith('the Triton kernel of LN(x) (norms_triton) is wrong in bfloat16')
    said = (tmp_path / 'kernels.txt').read_text()
    assert 'LN(x)' in said and said.endswith('replaced by operations of torch: norms_triton\n')
    assert operators() == {'convolve_triton', 'times_swapped_triton'}


@pytest.mark.parametrize(
    ('kernels', 'used'),
    [('unchecked', {'convolve_triton', 'times_swapped_triton', 'add_norm_triton'}), ('off', set())],
)
def test_the_config_turns_the_check_or_the_kernels_off(kernels, used, runner, tmp_path):
    HOOKS.build(dict(type='KernelCheckHook', kernels=kernels)).before_train(runner)
    assert not runner.checked and operators() == used
    assert (tmp_path / 'kernels.txt').exists()


def test_without_a_gpu_nothing_is_said(runner, monkeypatch, tmp_path):
    monkeypatch.undo()
    HOOKS.build(dict(type='KernelCheckHook')).before_train(runner)
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_breaks_the_device_ends_the_training(monkeypatch):
    def broken(device):
        raise RuntimeError('an illegal memory access was encountered')

    monkeypatch.setattr(torch.cuda, 'synchronize', broken)
    case = kernel_check.CASES[0]
    with pytest.raises(RuntimeError, match=r'LN\(x\).*set POLYNEXT_KERNELS=off and start again'):
        kernel_check.require_working(torch.device('cuda'), case, RuntimeError())
