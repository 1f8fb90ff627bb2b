"""Check checkpoints before the data is read, which takes a minute for COCO."""

from __future__ import annotations

import os

from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ...compat.mmengine import load_from, resumes
from ...weights import loading
from ...weights.names import BACKBONE
from ...weights.reading import UNSAFE
from .. import models
from ..checkpoints.guard import CheckpointGuardHook
from .findings import is_local


def check_checkpoint(runner: Runner, task: str) -> None:
    """Check that what a runner will load exists and fits, without loading it.

    The weights of the backbone's ``init_cfg`` are checked too, if they will be used. For models
    without a backbone of this package, only the existence of the file is checked.

    Args:
        runner: The runner, built but not started.
        task: Its method, 'train', 'val' or 'test'.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read or does not fit.
    """
    model, source = models.unwrapped(runner.model), load_from(runner)
    if source:
        if str(source).startswith(UNSAFE):
            return
        if is_local(source) and not os.path.exists(os.path.expanduser(source)):
            raise FileNotFoundError(
                f'there is no checkpoint {source}: check the path (it is taken from {os.getcwd()} '
                'if it is relative)'
            )
        if models.backbones(model):
            _try(model, source, _guard(runner), evaluation=task != 'train')
    elif task == 'train' and not resumes(runner):
        for backbone in models.backbones(model).values():
            init_cfg = backbone.init_cfg
            if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
                checkpoint = CheckpointLoader.load_checkpoint(
                    init_cfg['checkpoint'], 'cpu', 'current'
                )
                state_dict = dict(checkpoint['state_dict'])
                backbone.adapt(state_dict, '', init_cfg['checkpoint'])


def _guard(runner: Runner) -> CheckpointGuardHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointGuardHook)), None)


def _try(
    model: nn.Module, source: str, guard: CheckpointGuardHook | None, evaluation: bool
) -> None:
    backbones = models.backbones(model)
    state_dict = dict(CheckpointLoader.load_checkpoint(source, 'cpu', 'current')['state_dict'])
    prefixes = [f'{name}.' if name else '' for name in backbones]
    if prefixes != [BACKBONE] and not all(
        any(key.startswith(prefix) for key in state_dict) for prefix in prefixes
    ):
        return  # some models, such as SoftTeacher, rename keys on loading; the backbone checks then
    if guard is not None and '' not in backbones:
        reset = guard.reset_mismatched_heads
        loading.check(model, state_dict.copy(), source, reset, evaluation, backbones)
    for prefix, backbone in zip(prefixes, backbones.values()):
        backbone.adapt(state_dict, prefix, source)
