"""The device that these tests are about."""

import os

import torch

DEVICE = os.environ.get('POLYNEXT_TEST_DEVICE', 'cuda')
#: Of the environment: a file that gets a line for every test, and whose tests are not run again.
RESULTS = 'POLYNEXT_TEST_RESULTS'


def is_available():
    accelerator = (
        torch.accelerator.current_accelerator()
        if hasattr(torch, 'accelerator') and torch.accelerator.is_available()  # from 2.6
        else None
    )
    return DEVICE == 'cpu' or accelerator is not None and accelerator.type == DEVICE


def loss_of(features):
    """The loss of a regression of all features to a ramp, float32 or wider, on their device."""
    wide = [f if f.dtype is torch.float64 else f.float() for f in features]
    ramps = [torch.linspace(-1, 1, f.numel(), device=f.device).view(f.shape) for f in wide]
    return sum((f - ramp).square().mean() for f, ramp in zip(wide, ramps))
