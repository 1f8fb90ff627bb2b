"""Every private name of mmengine, mmcv, mmseg and mmdet that this package depends on.

If a new release renames one, only this module breaks, and its tests say where. Nothing else in the
package reads or sets a private attribute of their objects.

It does not import mmengine at the top: the first import of mmengine registers this package, and
that needs this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.runner import BaseLoop, Runner
    from torch import nn

#: Private methods and attributes of mmengine's classes that subclasses in this package override.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    'CheckpointHook': (
        '_default_greater_keys',
        '_publish_model',
        '_save_best_checkpoint',
        '_save_checkpoint_with_step',
    ),
}


def greater_is_better() -> tuple[str, ...]:
    """Return parts of metric names for which ``save_best`` keeps the greatest value."""
    from mmengine.hooks import CheckpointHook

    return tuple(CheckpointHook._default_greater_keys)


# The Runner


def load_from(runner: Runner) -> str | None:
    """Return the checkpoint that a run loads or resumes from, if any is named."""
    return runner._load_from


def resumes(runner: Runner) -> bool:
    """Return whether a run resumes, from :func:`load_from` or from its newest checkpoint."""
    return runner._resume


def set_resume(runner: Runner, source: str | None) -> None:
    """Make a run resume from ``source``, or start afresh if it is None.

    A run that starts afresh still loads the weights of :func:`load_from`.
    """
    runner._resume = source is not None
    if source is not None:
        runner._load_from = source


def set_load_from(runner: Runner, source: str) -> None:
    """Make a run load ``source``, after the file was moved."""
    runner._load_from = source


def loops(runner: Runner) -> dict[str, BaseLoop]:
    """Return the loops that a run has built so far, of 'train', 'val' and 'test'."""
    from mmengine.runner import BaseLoop

    candidates = {
        'train': runner._train_loop,
        'val': runner._val_loop,
        'test': runner._test_loop,
    }
    return {task: loop for task, loop in candidates.items() if isinstance(loop, BaseLoop)}


def trains(runner: Runner) -> bool:
    """Return whether a run trains: mmengine builds the training loop before it calls hooks."""
    return 'train' in loops(runner)


def train_dataloader_settings(runner: Runner) -> Any:
    """Return ``train_dataloader`` as the config gives it, even after the loader was built."""
    return runner._train_dataloader


def decide_val_interval(loop: BaseLoop) -> None:
    """Update ``val_interval`` of a training loop from its ``dynamic_intervals``."""
    loop._decide_current_val_interval()


# Models and optimizer wrappers


def run_forward(model: BaseModel, data: Any, mode: str) -> Any:
    """Call a model on what its data preprocessor returned, a dict or a sequence."""
    return model._run_forward(data, mode=mode)


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """Return how many iterations accumulate gradients for a step; 1 if unknown."""
    return getattr(wrapper, '_accumulative_counts', 1)


def normalizes(preprocessor: nn.Module) -> bool | None:
    """Return whether a data preprocessor applies ``mean`` and ``std``; None if it has neither."""
    return getattr(preprocessor, '_enable_normalize', None)


def converts_channels(preprocessor: nn.Module) -> bool:
    """Return whether a data preprocessor reverses the channels, from BGR to RGB or back."""
    # mmseg of OpenMMLab has the public name, mmengine and onedl's mmseg the private one
    names = ('channel_conversion', '_channel_conversion')
    return any(getattr(preprocessor, name, False) for name in names)


# Configs and files


def settings_of(config: Config) -> Mapping:
    """Return the settings of a config without its methods and attributes."""
    return config._cfg_dict
