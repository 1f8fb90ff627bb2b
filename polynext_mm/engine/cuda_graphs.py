"""The backbones of a training as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..backbones.polynext import PolyNeXt
from ..compat.mmengine import accumulative_counts
from . import models
from .training_scope import stop_after_training


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Launch the forward and backward pass of a training's backbone as one CUDA graph each.

    For crops of one size in one process, where the host launches kernels more slowly than the GPU
    runs them. The shape of the first batch is captured by ``torch.cuda.make_graphed_callables``. In
    evaluation, on batches of other shapes, and when a backbone is called again within an iteration
    (siamese models), kernels are launched one by one as usual. For several processes or sizes,
    use ``compile_cells='reduce-overhead'`` of the backbone instead.

    Every PolyNeXt in the model that trains is captured, whatever its name.

    Raises:
        ValueError: Before the first step, for a setting that a graph cannot take.
    """

    def __init__(self):
        self._graphed: list[_Graphed] = []

    def before_run(self, runner: Runner) -> None:
        stop_after_training(runner, lambda: self.after_train(runner))

    def before_train(self, runner: Runner) -> None:
        backbones = [
            backbone
            for backbone in models.backbones(runner.model).values()
            if isinstance(backbone, PolyNeXt)
            and any(param.requires_grad for param in backbone.parameters())
        ]
        reasons = list(_reasons_against(backbones, runner))
        if reasons:
            raise ValueError(
                f'CUDAGraphHook cannot work: {"; ".join(reasons)}. Change that, or remove the hook '
                'from custom_hooks'
            )
        self._graphed = [_Graphed(backbone) for backbone in backbones]
        for graphed in self._graphed:
            graphed.backbone.forward = graphed

    def before_train_iter(self, runner: Runner, **step: object) -> None:
        for graphed in self._graphed:
            graphed.replayed = False

    def after_train(self, runner: Runner) -> None:
        for graphed in self._graphed:
            del graphed.backbone.forward  # which restores the method of the class
        self._graphed = []


class _Graphed:
    """The forward pass of a backbone, replayed from a graph where possible."""

    def __init__(self, backbone: PolyNeXt):
        self.backbone = backbone
        # a second replay before the backward pass would overwrite what the first one saved for it
        self.replayed = False
        self._shape: torch.Size | None = None
        self._replay: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        backbone = self.backbone
        launch = type(backbone).forward
        if self.replayed or not (backbone.training and torch.is_grad_enabled()):
            return launch(backbone, x)
        if self._replay is None:
            self._shape, self._replay = x.shape, _capture(backbone, x)
        if x.shape != self._shape:
            return launch(backbone, x)
        self.replayed = True
        return self._replay(x)


class _Launched(nn.Module):
    """The backbone without hooks, since capturing refuses modules with hooks."""

    def __init__(self, backbone: PolyNeXt):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return type(self.backbone).forward(self.backbone, x)


def _capture(backbone: PolyNeXt, x: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    # cached casts are valid only within the autocast of this step
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return torch.cuda.make_graphed_callables(_Launched(backbone), (x.detach().clone(),))
    finally:
        torch.set_autocast_cache_enabled(cached)


def _reasons_against(backbones: list[PolyNeXt], runner: Runner) -> Iterator[str]:
    if not backbones:
        yield f'no PolyNeXt trains in {type(models.unwrapped(runner.model)).__name__}'
        return
    device = _device(backbones[0])
    if device != 'cuda':
        yield f'the model is on {device}, and CUDA graphs need a GPU of CUDA or ROCm'
    if runner.world_size > 1:
        yield f'it is for one process, and there are {runner.world_size}'
    if accumulative_counts(runner.optim_wrapper) > 1:
        # the next backward pass would overwrite the gradients of the one before
        yield 'gradients accumulate (accumulative_counts)'
    if any(stage.with_cp for backbone in backbones for stage in backbone.stages):
        yield 'the backbone has with_cp=True'
    if any(backbone.norm == 'bn' for backbone in backbones):
        yield "the backbone has norm='bn', whose norms change their size"
    if any(backbone.compile_mode == 'reduce-overhead' for backbone in backbones):
        yield "the backbone has CUDA graphs of its own by compile_cells='reduce-overhead'"


def _device(backbone: PolyNeXt) -> str:
    return next(backbone.parameters()).device.type
