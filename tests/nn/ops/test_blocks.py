"""On a CPU large maps are taken in blocks and bands: their size changes no number."""

import dataclasses

import pytest
import torch

from polynext_mm.nn import PolyNeXt, get_arch
from polynext_mm.nn.ops import blocks
from tests.helpers import zipped

# odd inner widths in the two stages of PolyConv
ARCH = dataclasses.replace(
    get_arch('apolynext_t'),
    widths=(20, 30, 64, 64),
    depths=(1, 1, 1, 1),
    conv_ratios=(1.05, 0.9, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
)
BLOCKS = (1 << 9, 1 << 12, 1 << 14)


def run(train: bool, needs_grad: bool):
    """Features and gradients of two images, float64, always of the same numbers."""
    torch.manual_seed(0)
    model = PolyNeXt(ARCH, drop_path_rate=0.5).double().train(train)
    x = torch.randn(2, 3, 101, 75).double()
    with torch.set_grad_enabled(needs_grad):
        features = model(x)
    if needs_grad:
        sum((f * f.detach().cos()).sum() for f in features).backward()
    return [*features, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('needs_grad', [False, True])
def test_the_size_of_blocks_changes_nothing(train, needs_grad, monkeypatch):
    monkeypatch.setattr(blocks, 'CPU_BLOCK', 1 << 40)
    expected = run(train, needs_grad)
    for block in BLOCKS:
        monkeypatch.setattr(blocks, 'CPU_BLOCK', block)
        for actual, whole in zipped(run(train, needs_grad), expected):
            torch.testing.assert_close(actual, whole, rtol=0, atol=1e-12 * whole.abs().max().item())


@pytest.mark.parametrize('train', [False, True])
def test_features_are_the_same_with_and_without_gradients(train):
    for actual, expected in zip(run(train, False), run(train, True)):
        torch.testing.assert_close(
            actual, expected.detach(), rtol=0, atol=1e-12 * expected.abs().max().item()
        )
