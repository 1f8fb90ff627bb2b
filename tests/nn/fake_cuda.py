"""Run networks forward on CUDA tensors that hold no numbers, which needs no GPU.

A program of its own, since it changes how the whole process takes CUDA: tests/nn/test_devices.py
runs it.
"""

import contextlib
import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polynext_mm.nn import PolyNeXt
from tests.helpers.tiny import TINY_ARCH

ARCH = dict(TINY_ARCH, widths=(16, 32, 64, 96))  # wide enough for the kernels of a GPU
HALF = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@contextlib.contextmanager
def autocast(dtype):
    """What ``torch.autocast('cuda')`` does, which without a GPU does nothing."""
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled('cuda', False)


def build(dtype):
    """Fake parameters cannot be cast: they are made in their dtype."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device('cuda'):
            return PolyNeXt(ARCH, drop_path_rate=0.3)
    finally:
        torch.set_default_dtype(torch.float32)


def check(train, precision, size):
    half = HALF.get(precision.removeprefix('model in '))
    of_model = half if precision.startswith('model in ') else torch.float32
    context = autocast(half) if half and of_model is torch.float32 else contextlib.nullcontext()
    with FakeTensorMode(), torch.set_grad_enabled(train):
        model = build(of_model).train(train)
        image = torch.empty(2, 3, *size, device='cuda', dtype=of_model)
        with context:
            features = model(image)
    for stage, feature in enumerate(features):
        stride = 4 * 2**stage
        assert feature.device.type == 'cuda' and feature.dtype is of_model, feature
        assert feature.shape[2:] == tuple(-(-side // stride) for side in size), feature.shape
        assert feature.is_contiguous(memory_format=torch.channels_last)


def main():
    torch._C._ensureCUDADeviceGuardSet()
    for name in ('kaiming_uniform_', 'kaiming_normal_'):  # they want a generator of CUDA's
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    precisions = ['float32', *HALF, *(f'model in {name}' for name in HALF)]
    for cudnn in (True, False):
        with torch.backends.cudnn.flags(enabled=cudnn):
            for case in (
                *itertools.product((False, True), precisions, [(33, 95)]),
                *itertools.product((False, True), precisions[:1], [(64, 64)]),
            ):
                try:
                    check(*case)
                except Exception as error:
                    raise RuntimeError(f'{case}, cuDNN {"on" if cudnn else "off"}') from error
    print('all cases passed')


if __name__ == '__main__':
    main()
