"""The backbone of a training as a CUDA graph."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..backbones.polynext import PolyNeXt
from . import models


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Launch the backbone's forward and backward pass of training as one CUDA graph each.

    For crops of one size in one process, where the host launches kernels more slowly than the GPU
    runs them. The shape of the first batch is captured by ``torch.cuda.make_graphed_callables``; in
    evaluation, and on batches of other shapes, kernels are launched one by one as ever. In several
    processes or for several sizes, ``compile_cells='reduce-overhead'`` of the backbone does the
    like.

    Raises:
        ValueError: Before the first step, for a setting that a graph cannot take.
    """

    def __init__(self):
        self._backbone: PolyNeXt | None = None
        self._shape: torch.Size | None = None
        self._graphed = None

    def before_train(self, runner: Runner) -> None:
        backbone = getattr(models.unwrapped(runner.model), 'backbone', None)
        reasons = list(_reasons_against(backbone, runner))
        if reasons:
            raise ValueError(
                f'CUDAGraphHook cannot work: {"; ".join(reasons)}. Change that, or remove the hook '
                'from custom_hooks'
            )
        self._backbone, self._shape, self._graphed = backbone, None, None
        backbone.forward = self._forward

    def after_train(self, runner: Runner) -> None:
        if self._backbone is not None:
            del self._backbone.forward  # what is left is the class's
        self._backbone = self._graphed = None

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        backbone = self._backbone
        launched = type(backbone).forward
        if not (backbone.training and torch.is_grad_enabled()):
            return launched(backbone, x)
        if self._graphed is None:
            self._shape, self._graphed = x.shape, _capture(backbone, x)
        return self._graphed(x) if x.shape == self._shape else launched(backbone, x)


class _Launched(nn.Module):
    """The backbone without hooks, which a capture refuses."""

    def __init__(self, backbone: PolyNeXt):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return type(self.backbone).forward(self.backbone, x)


def _capture(backbone: PolyNeXt, x: Tensor):
    # cached casts would belong to the autocast of this step alone
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return torch.cuda.make_graphed_callables(_Launched(backbone), (x.detach().clone(),))
    finally:
        torch.set_autocast_cache_enabled(cached)


def _reasons_against(backbone: nn.Module | None, runner: Runner):
    if not isinstance(backbone, PolyNeXt):
        yield f'it is for models whose backbone is a PolyNeXt, got {type(backbone).__name__}'
        return
    device = _device(backbone)
    if device != 'cuda':
        yield f'the model is on {device}, and CUDA graphs need a GPU of CUDA or ROCm'
    if runner.world_size > 1:
        yield f'it is for one process, and there are {runner.world_size}'
    if runner.optim_wrapper._accumulative_counts > 1:
        # the next backward pass would overwrite the gradients of the one before
        yield 'gradients accumulate (accumulative_counts)'
    if any(stage.with_cp for stage in backbone.stages):
        yield 'the backbone has with_cp=True'
    if backbone.norm == 'bn':
        yield "the backbone has norm='bn', whose norms change their size"
    if backbone.compile_mode == 'reduce-overhead':
        yield "the backbone has CUDA graphs of its own by compile_cells='reduce-overhead'"


def _device(backbone: PolyNeXt) -> str:
    return next(backbone.parameters()).device.type
