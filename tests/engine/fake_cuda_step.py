"""Take optimizer steps on CUDA tensors that hold no numbers, which needs no GPU.

A program of its own, since it changes how the whole process takes CUDA:
tests/engine/test_synchronizations.py runs it.
"""

from __future__ import annotations

import itertools
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.engine.synchronizations import Synchronizations
from tests.helpers.files import ROOT
from tests.helpers.networks import build


def check(dtype: str, clip_grad: dict | None) -> None:
    cfg = Config.fromfile(ROOT / 'configs' / 'upernet_apolynext_t_ade20k.py').optim_wrapper
    cfg.update(dtype=dtype, clip_grad=clip_grad)
    # the environment of shapes lets a number be read, which the test is about
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device('cuda'):
        model = nn.Module()
        model.backbone = build(grad_clip_norm=5.0)
        wrapper = build_optim_wrapper(model, cfg)
        wrapper.message_hub = mock.Mock()
        finished = []
        with Synchronizations('cuda') as found:
            wrapper.optimizer.register_step_post_hook(lambda *_: finished.append(len(found.all)))
            for _ in range(2):
                before = len(found.all)
                with wrapper.optim_context(model):
                    pass
                loss = wrapper.scale_loss(torch.ones(()))
                wrapper.loss_scaler.scale(loss)
                for param in model.parameters():
                    param.grad = torch.empty_like(param)
                wrapper.step()
                wrapper.zero_grad()
                assert finished.pop() == before, found.all
    assert wrapper.cast_dtype is getattr(torch, dtype)
    scale = model.backbone.loss_scale
    assert (scale.device.type == 'cuda') if dtype == 'float16' else scale == 1, scale
    # the norm for the log, when everything is queued
    assert [name for name, _ in found.all] == ['_local_scalar_dense'] * 2 * bool(clip_grad), found


def main() -> None:
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda **_: True
    torch.amp.is_autocast_available = lambda device: True
    for name in ('kaiming_uniform_', 'kaiming_normal_'):  # they want a generator of CUDA's
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    for case in itertools.product(('bfloat16', 'float16'), (None, dict(max_norm=1.0))):
        check(*case)
    print('all cases passed')


if __name__ == '__main__':
    main()
