"""Check model, batch size and optimizer wrapper before the first optimizer step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sized

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ...backbones.polynext import PolyNeXt
from ...compat.mmengine import accumulative_counts
from .. import models
from ..optim import AutocastOptimWrapper
from .walk import ConfigError


# older configs use the second name
@HOOKS.register_module(name=['TrainingCheckHook', 'MachineHook'])
class TrainingCheckHook(Hook):
    """Stop a training that cannot work before its first optimizer step.

    - A batch of one image per process, even if only the last one of an epoch, where batch
      normalization needs more.
    - A per-cell gradient clip (``grad_clip_norm``) under an optimizer wrapper that scales the loss
      without telling the backbone.
    - Unused outputs of the backbone under DistributedDataParallel, which would stop with an error
      about reduction in the second iteration. They are found after the first backward pass, which
      shows what heads and necks really use, whatever their settings are called. In a single
      process they only cost time, so there the hook warns.

    Raises:
        ValueError: In each of these cases, naming the setting to change.
    """

    def before_train(self, runner: Runner) -> None:
        self._refuse_batch_of_one(runner)
        _spread_class_weights(models.unwrapped(runner.model))
        _allow_ignored_batches(models.unwrapped(runner.model))
        self._refuse_unknown_loss_scale(runner)
        self._watch_first_step(runner)

    @staticmethod
    def _refuse_batch_of_one(runner: Runner) -> None:
        model = models.unwrapped(runner.model)
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        single = _batch_of_one(runner.train_dataloader, runner.max_iters)
        if single is None or (synced and runner.world_size > 1):
            return
        what, remedy = single
        for name, module in model.named_modules():
            if isinstance(module, nn.Sequential) and _normalizes_single_pixels(module):
                raise ConfigError(
                    f'{what}: {name} pools each image to 1x1, and batch normalization needs more '
                    f'than one value per channel. Set {remedy}, or train on several GPUs (SyncBN)'
                )

    @staticmethod
    def _refuse_unknown_loss_scale(runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AutocastOptimWrapper) or not any(
            isinstance(backbone, PolyNeXt) and backbone.grad_clip_norm
            for backbone in models.backbones(runner.model).values()
        ):
            return
        counts = accumulative_counts(wrapper)
        if isinstance(wrapper, AmpOptimWrapper) or counts != 1:
            raise ValueError(
                'grad_clip_norm applies to gradients of the unscaled loss, and '
                f'{type(wrapper).__name__} with accumulative_counts={counts} '
                'scales it without telling the backbone: use '
                "optim_wrapper=dict(type='AutocastOptimWrapper', ...)"
            )

    @staticmethod
    def _watch_first_step(runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        seen = set()

        def check(optimizer: Optimizer, *_) -> None:
            if optimizer not in seen:  # a hook cannot be removed while it runs
                seen.add(optimizer)
                _report_unused_outputs(runner.model, optimizer)

        for one in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            one.optimizer.register_step_pre_hook(check)


def _batch_of_one(loader: DataLoader, iterations: int) -> tuple[str, str] | None:
    """Return why there will be a batch of one image, and the setting that prevents it."""
    more = 'train_dataloader.batch_size=2 or more'
    if loader.batch_size == 1:
        return 'training with a batch of 1 cannot work', more
    batches = loader.batch_sampler
    size, sampler = getattr(batches, 'batch_size', None), getattr(batches, 'sampler', None)
    # an InfiniteSampler has a length too, and its batches are full
    if isinstance(sampler, InfiniteSampler) or not isinstance(sampler, Sized) or not size:
        return None
    if getattr(batches, 'drop_last', False) or len(sampler) % size != 1 or iterations < len(loader):
        return None
    return (
        f'the last batch of every epoch has 1 image ({len(sampler)} images in batches of {size})',
        'train_dataloader.drop_last=True',
    )


def _normalizes_single_pixels(module: nn.Sequential) -> bool:
    """Return whether batch normalization follows a global pool, as in pyramid pooling and ASPP."""
    pools = (part for part in module if isinstance(part, nn.AdaptiveAvgPool2d))
    return any(pool.output_size in (1, (1, 1)) for pool in pools) and any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()
    )


def _spread_class_weights(model: nn.Module) -> None:
    """Let mmseg's binary cross entropy weight the classes of (B, C, H, W), not the columns."""
    for module in model.modules():
        criterion = getattr(module, 'cls_criterion', None)
        weights = getattr(module, 'class_weight', None)
        if (
            getattr(module, 'use_sigmoid', False)
            and getattr(criterion, '__module__', '').startswith('mmseg.')
            and isinstance(weights, (list, tuple))
            and all(isinstance(weight, (int, float)) for weight in weights)
        ):
            module.class_weight = [[[weight]] for weight in weights]


def _allow_ignored_batches(model: nn.Module) -> None:
    """Let a single logit learn nothing from a batch without labels, for which mmseg raises."""
    for module in model.modules():
        criterion = getattr(module, 'cls_criterion', None)
        if getattr(criterion, '__module__', '').startswith('mmseg.') and module.use_sigmoid:
            module.cls_criterion = functools.partial(_unless_all_ignored, criterion)


def _unless_all_ignored(criterion: Callable, pred: Tensor, label: Tensor, *args, **options):
    if pred.size(1) == 1 and (label == options.get('ignore_index', -100)).all():
        return pred.sum() * 0
    return criterion(pred, label, *args, **options)


def _report_unused_outputs(model: nn.Module, optimizer: Optimizer) -> None:
    """Look for outputs that get no gradient, between backward and step."""
    stops = isinstance(model, DistributedDataParallel) and not (
        model.find_unused_parameters or model.static_graph
    )
    trained = {id(param) for group in optimizer.param_groups for param in group['params']}
    for backbone in models.backbones(model).values():
        idle = [
            name
            for name, param in backbone.named_parameters()
            if param.grad is None and param.requires_grad and id(param) in trained
        ]
        unused = [
            index
            for index in backbone.out_indices
            if any(name.startswith((f'out_norms.{index}.', f'stages.{index}.')) for name in idle)
        ]
        used = tuple(index for index in backbone.out_indices if index not in unused)
        if not unused or not used:
            continue
        message = (
            f'no neck or head uses the outputs of stages {unused} of the backbone: set its '
            f'out_indices={used}; in_index of heads and in_channels of necks then count these '
            'outputs alone'
        )
        if stops:
            raise ValueError(
                f'{message}. DistributedDataParallel would stop in the second iteration, since '
                f'{len(idle)} parameters have no gradient, {idle[0]} among them'
            )
        print_log(message, logger='current', level=logging.WARNING)
