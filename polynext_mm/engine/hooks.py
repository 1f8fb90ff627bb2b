"""Hooks of every config here: checks of checkpoints, and of what a training run needs."""

from __future__ import annotations

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..backbones.multiscale import MultiScale
from ..backbones.polynext import PolyNeXt
from ..weights import CheckpointError, loading, names
from . import models
from .checks.normalization import find_mismatch
from .optim import AutocastOptimWrapper


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Check that checkpoints fit the whole model, and that images are normalized for them.

    The backbone checks its own weights wherever it is loaded; mm merely warns about other weights
    that do not fit, and this hook makes that an error. A file without heads, such as an ImageNet
    backbone, may start training but may not be evaluated. Where ``load_from`` or a resumed
    checkpoint brings the backbone's weights, those of ``init_cfg`` are not fetched.

    A ``data_preprocessor`` that normalizes images in another way than the published weights expect
    is an error where those weights are used as they are: when training starts from ``init_cfg``,
    and when a file in the authors' names is loaded. Where a checkpoint of another training replaces
    the weights of ``init_cfg``, it is a warning.

    Args:
        reset_mismatched_heads: Whether layers of the heads that have another shape in the
            checkpoint (for another number of classes) keep their initialization instead.
        allow_other_normalization: Whether another normalization is meant.

    Raises:
        CheckpointError: If the checkpoint or the normalization does not fit.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, reset_mismatched_heads: bool = False, allow_other_normalization: bool = False
    ):
        self.reset_mismatched_heads = reset_mismatched_heads
        self.allow_other_normalization = allow_other_normalization

    def before_run(self, runner: Runner) -> None:
        pretrained = [
            backbone
            for backbone in models.backbones(runner.model).values()
            if _names_weights(backbone.init_cfg)
        ]
        resumes = (
            runner._resume
            and not runner._load_from
            and find_latest_checkpoint(runner.work_dir) is not None
        )
        source = runner._load_from or (resumes and 'the latest checkpoint')
        if pretrained and (source or _trains(runner)):
            self._check_normalization(runner.model, is_error=not source)
        for backbone in models.backbones(runner.model).values() if source else ():
            if backbone.init_cfg:
                print_log(
                    f'{source} brings the backbone: its init_cfg is not fetched', logger='current'
                )
                backbone.init_cfg = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = models.unwrapped(runner.model)
        if not isinstance(getattr(model, 'backbone', None), MultiScale):
            return
        state_dict = checkpoint['state_dict']
        if names.is_authors({key.removeprefix('backbone.') for key in state_dict}):
            self._check_normalization(model, is_error=True)
        source = getattr(state_dict, '_metadata', {}).get('', {}).get('source', runner._load_from)
        print_log(
            loading.check(
                model,
                state_dict,
                source,
                self.reset_mismatched_heads,
                evaluation=not _trains(runner),
            ),
            logger='current',
        )
        if runner._resume and isinstance(model.backbone, PolyNeXt):
            # the state of the optimizer has the sizes of the checkpoint's norms
            model.backbone.keep_norm_size()

    def _check_normalization(self, model: nn.Module, is_error: bool) -> None:
        mismatch = find_mismatch(models.unwrapped(model))
        if mismatch is None or self.allow_other_normalization:
            return
        if is_error:
            raise CheckpointError(
                f'{mismatch}. Set data_preprocessor to that, or say that the difference is meant: '
                "dict(type='CheckpointGuardHook', allow_other_normalization=True)"
            )
        print_log(
            f'{mismatch}. This is right only if the checkpoint was trained like that',
            logger='current',
            level=logging.WARNING,
        )


@HOOKS.register_module()
class MachineHook(Hook):
    """Stop before the first optimizer step what cannot work.

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
        if isinstance(wrapper, AmpOptimWrapper) or wrapper._accumulative_counts != 1:
            raise ValueError(
                'grad_clip_norm applies to gradients of the unscaled loss, and '
                f'{type(wrapper).__name__} with accumulative_counts={wrapper._accumulative_counts} '
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


def _trains(runner: Runner) -> bool:
    return isinstance(runner._train_loop, BaseLoop)


def _names_weights(init_cfg: dict | list[dict] | None) -> bool:
    configs = init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]
    return any('checkpoint' in cfg for cfg in configs)
