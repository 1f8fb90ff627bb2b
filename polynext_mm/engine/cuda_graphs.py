"""The backbones of a training as CUDA graphs."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..backbones.polynext import PolyNeXt
from ..compat.mmengine import accumulative_counts
from . import models
from .random_numbers import random_state, set_random_state
from .training_scope import stop_after_training


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Launch the forward and backward pass of a training's backbone as one CUDA graph each.

    Use it for crops of one size, if the host launches kernels more slowly than the GPU runs them.
    The first batch's shape is captured by ``torch.cuda.make_graphed_callables``. In evaluation, on
    batches of other shapes, and when a backbone is called again within an iteration (siamese
    models), kernels are launched one by one as usual. For several sizes, use
    ``compile_cells='reduce-overhead'`` of the backbone instead.

    With several processes, the first batch is captured before it is trained on: the model is taken
    out of DistributedDataParallel, which must not see a capture, then captured and wrapped again.

    Every PolyNeXt that is trained in the model is captured, whatever its name.

    Raises:
        ValueError: Before the first step, for a setting that graphs do not support.
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

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        for graphed in self._graphed:
            graphed.replayed = False
        if isinstance(runner.model, DistributedDataParallel) and not all(
            graphed.is_captured() for graphed in self._graphed
        ):
            self._capture_unwrapped(runner, data_batch)

    def _capture_unwrapped(self, runner: Runner, data_batch: Any) -> None:
        """Capture the graphs before wrapping, the order that torch requires.

        The wrapper's gradient hooks belong to the stream they were made on, and would tie it to the
        capture's stream.
        """
        model = runner.model.module
        runner.model = model
        gc.collect()  # the wrapper, with its gradient hooks
        state = random_state()  # so that training draws the same numbers as without a capture
        x = _images(model, data_batch)
        with runner.optim_wrapper.optim_context(model):
            for graphed in self._graphed:
                graphed.capture(x)
        set_random_state(state)
        runner.model = _wrapped(runner, model)

    def after_train(self, runner: Runner) -> None:
        for graphed in self._graphed:
            del graphed.backbone.forward  # restores the class's method
        self._graphed = []


class _Graphed:
    """The forward pass of a backbone, replayed from a graph where possible."""

    def __init__(self, backbone: PolyNeXt):
        self.backbone = backbone
        # a second replay before the backward pass would overwrite what the first one saved for it
        self.replayed = False
        self._shape: torch.Size | None = None
        self._replay: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def is_captured(self) -> bool:
        return self._replay is not None

    def capture(self, x: Tensor) -> None:
        """Capture both passes for images of the shape of ``x``, which itself is not changed."""
        self._shape, self._replay = x.shape, _capture(self.backbone, x)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        backbone = self.backbone
        launch = type(backbone).forward
        if self.replayed or not (backbone.training and torch.is_grad_enabled()):
            return launch(backbone, x)
        if self._replay is None:
            self.capture(x)
        if self._replay is None or x.shape != self._shape:
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
    make: Callable[..., Any] = torch.cuda.make_graphed_callables
    settings = {}
    if 'capture_error_mode' in inspect.signature(make).parameters:
        # threads that pin memory or watch NCCL may make calls that this one may not
        settings['capture_error_mode'] = 'thread_local'
    # cached casts are valid only within the autocast of this step
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return make(_Launched(backbone), (x.detach().clone(),), **settings)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _images(model: BaseModel, data_batch: Any) -> Tensor:
    """Return the images of a batch as a backbone gets them; the batch is not changed."""
    data = model.data_preprocessor(copy.deepcopy(data_batch), training=True)
    x = data.get('inputs') if isinstance(data, dict) else None
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(
            f'CUDAGraphHook cannot work: the data_preprocessor of {type(model).__name__} returns '
            "no 'inputs' of (B, 3, H, W), whose shape is needed in several processes. Remove the "
            'hook from custom_hooks'
        )
    return x


def _wrapped(runner: Runner, model: nn.Module) -> nn.Module:
    """Wrap a model as the runner did when it was built."""
    cfg = runner.cfg
    converted = cfg.pop('sync_bn', None)  # the layers are converted already
    try:
        return runner.wrap_model(cfg.get('model_wrapper_cfg'), model)
    finally:
        if converted is not None:
            cfg.sync_bn = converted


def _reasons_against(backbones: list[PolyNeXt], runner: Runner) -> Iterator[str]:
    if not backbones:
        yield f'no PolyNeXt trains in {type(models.unwrapped(runner.model)).__name__}'
        return
    device = _device(backbones[0])
    if device != 'cuda':
        yield f'the model is on {device}, and CUDA graphs need a GPU of CUDA or ROCm'
    if is_model_wrapper(runner.model) and not isinstance(runner.model, DistributedDataParallel):
        kind = type(runner.model).__name__
        yield f'the model is wrapped in {kind}, and only DistributedDataParallel goes with graphs'
    if accumulative_counts(runner.optim_wrapper) > 1:
        # the next backward pass would overwrite the gradients of the one before, no_sync() or not
        yield 'gradients accumulate (accumulative_counts)'
    if any(stage.with_cp for backbone in backbones for stage in backbone.stages):
        yield 'the backbone has with_cp=True'
    if any(backbone.norm == 'bn' for backbone in backbones):
        yield "the backbone has norm='bn', whose norms change their size"
    if any(backbone.compile_mode == 'reduce-overhead' for backbone in backbones):
        yield "the backbone has CUDA graphs of its own by compile_cells='reduce-overhead'"


def _device(backbone: PolyNeXt) -> str:
    return next(backbone.parameters()).device.type
