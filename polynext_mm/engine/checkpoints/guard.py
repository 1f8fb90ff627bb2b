"""The hook that checks the checkpoints a run loads."""

from __future__ import annotations

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from ...backbones.polynext import PolyNeXt
from ...compat import mmengine as private
from ...weights import CheckpointError, loading, names
from ...weights.errors import shown
from ...weights.names import BACKBONE
from ...weights.reading import UNSAFE
from .. import models
from ..checks.normalization import find_mismatch
from . import resuming


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Check that checkpoints fit the whole model, and that images are normalized for them.

    The backbone checks its own weights wherever it is loaded; mm merely warns about other weights
    that do not fit, and this hook makes that an error. Training may start from a file without
    heads, such as an ImageNet backbone, but evaluation may not. If ``load_from`` or a resumed
    checkpoint provides the backbone's weights, those of ``init_cfg`` are not downloaded.

    A ``data_preprocessor`` that normalizes images differently than the published weights expect is
    an error where those weights are used directly: when training starts from ``init_cfg``, and when
    a file with the authors' parameter names is loaded. If a checkpoint of another training replaces
    the weights of ``init_cfg``, it is a warning.

    Args:
        reset_mismatched_heads: Whether layers of the heads whose shape differs in the checkpoint
            (for a different number of classes) keep their initialization instead.
        allow_other_normalization: Whether a different normalization is intended.

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
            private.resumes(runner)
            and not private.load_from(runner)
            and find_latest_checkpoint(runner.work_dir) is not None
        )
        if resumes:
            _require_plain_path(runner)
        source = private.load_from(runner) or (resumes and 'the latest checkpoint')
        if pretrained and (source or private.trains(runner)):
            self._check_normalization(runner.model, is_error=not source)
        for backbone in models.backbones(runner.model).values() if source else ():
            if backbone.init_cfg:
                print_log(
                    f'{source} brings the backbone: its init_cfg is not fetched', logger='current'
                )
                backbone.init_cfg = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = checkpoint.get('state_dict', checkpoint)
        source = (
            getattr(weights, '_metadata', {}).get('', {}).get('source', private.load_from(runner))
        )
        if private.resumes(runner):
            resuming.require_training(checkpoint, source)
            resuming.keep_files_inside(checkpoint, resuming.folders(runner))
            _require_whole_average(checkpoint, source)
        model = models.unwrapped(runner.model)
        backbones = models.backbones(model)
        if not backbones:
            return
        # a teacher and its student load the file of a plain detector, too
        places = {BACKBONE, *(f'{name}.' for name in backbones)}
        if any(names.is_authors({key.removeprefix(place) for key in weights}) for place in places):
            self._check_normalization(model, is_error=True)
        # a resumed checkpoint has all heads
        whole = private.resumes(runner) or not private.trains(runner)
        if whole:
            _require_order_of_classes(runner, checkpoint, source)
        for part in (weights, checkpoint.get('ema_state_dict', {})):
            loading.set_options(
                part, evaluation=whole, reset_mismatched_heads=self.reset_mismatched_heads
            )
        if private.resumes(runner):
            for backbone in backbones.values():
                if isinstance(backbone, PolyNeXt):
                    # the optimizer state has the shapes of the checkpoint's norms
                    backbone.keep_norm_size()

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


def _require_whole_average(checkpoint: dict, source: str) -> None:
    """Check that EMAHook, which swaps weights by name, finds all of them."""
    weights, prefix = checkpoint['state_dict'], 'module.'
    average = {
        key.removeprefix(prefix): value
        for key, value in checkpoint.get('ema_state_dict', {}).items()
        if key.startswith(prefix) and hasattr(value, 'shape')
    }
    if average:
        missing = [key for key in weights if key not in average]
        hint = 'its average and its weights differ: resume from another checkpoint'
        loading.raise_unless_equal(weights, average, missing, source, lambda: hint)


def _require_order_of_classes(runner: Runner, checkpoint: dict, source: str) -> None:
    """Check that the data sets of a run number the classes as those of the checkpoint's training.

    Other names are possible: a class may have been renamed.
    """
    meta = checkpoint.get('meta')
    described = meta.get('dataset_meta') if isinstance(meta, dict) else None
    trained = described.get('classes') if isinstance(described, dict) else None
    if not isinstance(trained, (list, tuple)):
        return
    for task, loop in private.loops(runner).items():
        dataset = getattr(loop.dataloader, 'dataset', None)
        classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
        if list(classes) != list(trained) and sorted(map(str, classes)) == sorted(
            map(str, trained)
        ):
            raise CheckpointError(
                f'{source} was trained with the classes of {task}_dataloader in another order: '
                f'set metainfo.classes to {tuple(trained)}'
            )


def _require_plain_path(runner: Runner) -> None:
    """Check that ``last_checkpoint`` names a plain file, not a source such as ``unsafe:``."""
    latest = str(find_latest_checkpoint(runner.work_dir))
    if latest.startswith(UNSAFE) or '://' in latest:
        raise CheckpointError(
            f'last_checkpoint in {runner.work_dir} says {shown(repr(latest), 200)}, which is no '
            'file of a training: name the checkpoint to resume from, --resume FILE'
        )


def _names_weights(init_cfg: dict | list[dict] | None) -> bool:
    configs = init_cfg if isinstance(init_cfg, list) else [init_cfg or {}]
    return any('checkpoint' in cfg for cfg in configs)
