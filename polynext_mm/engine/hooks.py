"""The hook that checks the checkpoints which a run loads."""

from __future__ import annotations

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from torch import nn

from ..backbones.multiscale import MultiScale
from ..backbones.polynext import PolyNeXt
from ..weights import CheckpointError, loading, names
from . import models
from .checks.normalization import find_mismatch


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
        if is_error and mismatch.is_certain:
            raise CheckpointError(
                f'{mismatch}. Set data_preprocessor to that, or say that the difference is meant: '
                "dict(type='CheckpointGuardHook', allow_other_normalization=True)"
            )
        print_log(
            f'{mismatch}. This is right only if the checkpoint was trained like that',
            logger='current',
            level=logging.WARNING,
        )


def _trains(runner: Runner) -> bool:
    return isinstance(runner._train_loop, BaseLoop)


def _names_weights(init_cfg: dict | list[dict] | None) -> bool:
    configs = init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]
    return any('checkpoint' in cfg for cfg in configs)
