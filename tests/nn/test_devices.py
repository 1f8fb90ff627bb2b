"""Half precision, and devices that are not here."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from polynext_mm.compat.torch_features import AUTOCAST_BY_DEVICE, TRITON_KERNELS, can_autocast
from polynext_mm.nn import PolyNeXt
from polynext_mm.nn.ops import dispatch
from polynext_mm.nn.ops.precision import matmul_dtype
from tests import golden
from tests.helpers.files import ROOT
from tests.helpers.programs import python
from tests.helpers.tiny import TINY_ARCH, randomized
from tests.marks import needs

HALF = [torch.bfloat16, torch.float16]


def step(model, image):
    """Features, and all gradients of a loss as one vector, in float32."""
    model.zero_grad()
    features = model(image)
    golden.loss([feature.float() for feature in features], (32, 48)).backward()
    return features, torch.cat([param.grad.float().flatten() for param in model.parameters()])


@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_a_model_in_half_precision_is_close_to_float32(dtype):
    """Within what 14 branches of rounding add up to; each gate is about a half."""
    image = golden.image((32, 48), batch=2)
    model = randomized(PolyNeXt(TINY_ARCH))
    features, gradient = step(model, image)
    half, half_gradient = step(model.to(dtype), image.to(dtype))
    with torch.no_grad():
        inferred = model.eval()(image.to(dtype))
    eps = torch.finfo(dtype).eps
    assert (half_gradient - gradient).norm() < 16 * eps * gradient.norm()
    for a, b, c in zip(half, inferred, features):
        assert a.dtype is b.dtype is dtype
        for feature in (a, b):
            assert (feature.float() - c).norm() < 8 * eps * c.norm()


@needs(AUTOCAST_BY_DEVICE)
@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_autocast_of_half_activations(dtype):
    """As a stem of somebody else's hands them over: the stream is float32 all the same."""
    image = golden.image((32, 48), batch=2)
    model = randomized(PolyNeXt(TINY_ARCH))
    features, gradient = step(model, image)
    with torch.autocast('cpu', dtype):
        half, half_gradient = step(model, image.to(dtype))
    eps = torch.finfo(dtype).eps
    assert (half_gradient - gradient).norm() < 16 * eps * gradient.norm()
    for a, b in zip(half, features):
        assert a.dtype is torch.float32
        assert (a - b).norm() < 8 * eps * b.norm()


@pytest.mark.heavy
@pytest.mark.skipif(
    not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
    reason='this torch makes no CUDA tensors without CUDA, not even without numbers',
)
def test_forward_on_cuda_tensors_that_hold_no_numbers():
    """float32, autocast and models in half precision, with cuDNN and without, any memory format."""
    assert 'all cases passed' in python('-m', 'tests.nn.fake_cuda', cwd=ROOT)


# Devices that this build of torch cannot make tensors of, not even without numbers


def on(device):
    """What decides about a tensor: its device, its dtype and its shape."""
    return SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=(2, 5, 64, 32))


@contextlib.contextmanager
def autocast(device, dtype):
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)


@needs(AUTOCAST_BY_DEVICE)
@pytest.mark.parametrize('device', ['cpu', 'cuda', 'mps', 'xpu'])
def test_products_follow_the_autocast_of_their_own_device(device):
    if not can_autocast(device):
        pytest.skip(f'this torch has no autocast on {device}')
    other = 'cpu' if device != 'cpu' else 'cuda'
    with autocast(other, torch.bfloat16):
        assert matmul_dtype(on(device)) is torch.float32
    with autocast(device, torch.float16):
        assert matmul_dtype(on(device)) is torch.float16
        assert matmul_dtype(on(other)) is torch.float32
        with dispatch._without_autocast(device):
            assert matmul_dtype(on(device)) is torch.float32
        with dispatch._without_autocast(other):
            assert matmul_dtype(on(device)) is torch.float16


@needs(TRITON_KERNELS)
@pytest.mark.parametrize('device', ['cpu', 'mps', 'xpu'])
def test_the_triton_kernel_is_for_cuda_and_rocm(device):
    """Elsewhere attention takes the blocks that are made of torch's operations."""
    from polynext_mm.nn.ops import poly_attention_triton

    assert not poly_attention_triton.supports(*[on(device)] * 3)
    assert poly_attention_triton.supports(*[on('cuda')] * 3)
