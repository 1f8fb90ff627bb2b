"""Training on the device by the optimizer wrapper of the configs, and what depends on it."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from polynext_mm.engine import CUDAGraphHook
from tests import golden
from tests.cuda.on_device import loss_of
from tests.helpers.files import ROOT
from tests.helpers.networks import build
from tests.helpers.programs import python
from tests.helpers.tiny import randomized

SIZE = (64, 96)


def trained(device, dtype, steps, hook=None, **backbone):
    """Losses of steps on one batch, and the wrapper."""
    cfg = Config.fromfile(ROOT / 'configs' / 'upernet_apolynext_t_ade20k.py').optim_wrapper
    cfg.update(dtype=dtype, clip_grad=dict(max_norm=1.0))
    cfg.optimizer.lr = 1e-3
    model = nn.Module()
    model.backbone = randomized(build(**backbone)).to(device)
    wrapper = build_optim_wrapper(model, cfg)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper)
    if hook is not None:
        hook.before_train(runner)
    image, losses = golden.image(SIZE, batch=2).to(device), []
    for step in range(steps):
        if hook is not None:
            hook.before_train_iter(runner, batch_idx=step)
        with wrapper.optim_context(model):
            features = model.backbone(image)
        loss = loss_of(features)
        losses.append(loss.detach())
        wrapper.update_params(loss)
    return torch.stack(losses).cpu(), wrapper


@pytest.mark.parametrize('clip', [None, 5.0])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_mixed_precision_with_and_without_loss_scaling(dtype, clip, device):
    losses, wrapper = trained(device, dtype, 8, grad_clip_norm=clip, drop_path_rate=0.0)
    expected, _ = trained('cpu', 'float32', 8, grad_clip_norm=clip, drop_path_rate=0.0)
    assert wrapper.cast_dtype is getattr(torch, dtype)
    assert wrapper.loss_scaler.is_enabled() == (dtype == 'float16')
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]
    tolerance = dict(float32=1e-3, bfloat16=0.05, float16=0.05)[dtype]
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_no_step_waits_for_the_device(dtype, cuda, monkeypatch):
    """But for the norm of the gradients, which is read for the log once all is queued."""
    read = []
    item = torch.Tensor.item
    trained('cuda', dtype, 2)  # tunes kernels, which waits

    def unwatched(tensor):
        read.append(tensor)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('default')
        try:
            return item(tensor)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    cfg = Config.fromfile(ROOT / 'configs' / 'upernet_apolynext_t_ade20k.py').optim_wrapper
    cfg.update(dtype=dtype, clip_grad=dict(max_norm=1.0))
    model = nn.Module()
    model.backbone = randomized(build(grad_clip_norm=5.0, drop_path_rate=0.3)).cuda()
    wrapper = build_optim_wrapper(model, cfg)
    image = golden.image(SIZE, batch=2).cuda()
    monkeypatch.setattr(torch.Tensor, 'item', unwatched)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            with wrapper.optim_context(model):
                features = model.backbone(image)
            wrapper.update_params(loss_of(features))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(read) == 3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_cuda_graphs(dtype, cuda):
    hook = CUDAGraphHook()
    replayed, _ = trained('cuda', dtype, 6, hook, grad_clip_norm=5.0)
    launched, _ = trained('cuda', dtype, 6, grad_clip_norm=5.0)
    assert hook._graphed[0].replayed
    torch.testing.assert_close(replayed, launched, rtol=1e-2, atol=0)


def test_several_devices(device):
    """DDP and norms over all processes, one for each device, or two on the CPU."""
    count = torch.cuda.device_count() if device == 'cuda' else 2
    printed = python(
        *('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'),
        ROOT / 'tests' / 'cuda' / 'in_every_process.py',
        device,
        PYTHONPATH=str(ROOT),
    )
    assert all(f'RANK {rank} agrees' in printed for rank in range(count)), printed


def test_cuda_graphs_on_several_devices(cuda):
    count = torch.cuda.device_count()
    printed = python(
        *('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'),
        ROOT / 'tests' / 'engine' / 'graphs_in_every_process.py',
        'cuda',
        PYTHONPATH=str(ROOT),
    )
    assert all(f'RANK {rank} agrees' in printed for rank in range(count)), printed


@pytest.mark.slow
def test_the_demo(tmp_path):
    """On the device that mm finds."""
    printed = python(
        *(ROOT / 'demo' / 'segmentation.py', '--max-iters', 20, '--work-dir', tmp_path),
        cwd=ROOT,
        PYTHONPATH=str(ROOT),
    )
    assert 'trained for 20 iterations' in printed
    assert (tmp_path / 'iter_20.pth').exists()
