"""What a training needs of its model, batch size and optimizer wrapper, told before it steps."""

from __future__ import annotations

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...backbones.polynext import PolyNeXt
from ...compat.mmengine import accumulative_counts
from .. import models
from ..optim import AutocastOptimWrapper


# the second name is in configs from before the first
@HOOKS.register_module(name=['TrainingCheckHook', 'MachineHook'])
class TrainingCheckHook(Hook):
    """Stop a training that cannot work before its first optimizer step.

    - A batch of one image per process where batch normalization needs more.
    - A per-cell gradient clip (``grad_clip_norm``) under an optimizer wrapper that scales the loss
      without telling the backbone.
    - Outputs of the backbone that nothing uses, with DistributedDataParallel, which would stop with
      an error about reduction in the second iteration. They are found after the first backward
      pass: that sees what any head or neck really uses, whatever its settings are called. In a
      single process they only cost time, so there the hook warns.

    Raises:
        ValueError: In each of these cases, naming the setting to change.
    """

    def before_train(self, runner: Runner) -> None:
        self._refuse_batch_of_one(runner)
        self._refuse_unknown_loss_scale(runner)
        self._watch_first_step(runner)

    @staticmethod
    def _refuse_batch_of_one(runner: Runner) -> None:
        batch_size = runner.train_dataloader.batch_size
        model = models.unwrapped(runner.model)
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        if batch_size != 1 or (synced and runner.world_size > 1):
            return
        for name, module in model.named_modules():
            # mmseg's pyramid pooling: after a 1x1 pool BN has one value per channel and image
            if 1 in getattr(module, 'pool_scales', ()) and any(
                isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()
            ):
                raise ValueError(
                    f'training with a batch of 1 cannot work: {name} pools each image to 1x1, and '
                    'batch normalization needs more than one value per channel. Set '
                    'train_dataloader.batch_size=2 or more, or train on several GPUs (SyncBN)'
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


def _report_unused_outputs(model: nn.Module, optimizer: Optimizer) -> None:
    """Look for outputs that no gradient comes back from, between backward and step."""
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
