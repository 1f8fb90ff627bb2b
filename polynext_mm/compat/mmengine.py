"""Every private name of mmengine, mmcv, mmseg and mmdet that this package depends on.

A new release of theirs that renames one breaks this module alone, and the tests of it say where.
Nothing else in the package reads or sets a private attribute of an object of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

#: Private methods and attributes of mmengine's classes that subclasses in this package override.
OVERRIDDEN: dict[type, tuple[str, ...]] = {
    CheckpointHook: (
        '_default_greater_keys',
        '_publish_model',
        '_save_best_checkpoint',
        '_save_checkpoint_with_step',
    ),
}
#: Parts of the names of metrics that ``save_best`` keeps the greatest value of.
GREATER_IS_BETTER: tuple[str, ...] = tuple(CheckpointHook._default_greater_keys)


# The Runner


def load_from(runner: Runner) -> str | None:
    """Return the checkpoint that a run loads or resumes from, if one is named."""
    return runner._load_from


def resumes(runner: Runner) -> bool:
    """Return whether a run resumes, from :func:`load_from` or from its newest checkpoint."""
    return runner._resume


def set_resume(runner: Runner, source: str | None) -> None:
    """Let a run resume from ``source``, or start afresh if it is None.

    A run that starts afresh still loads the weights of :func:`load_from`.
    """
    runner._resume = source is not None
    if source is not None:
        runner._load_from = source


def set_load_from(runner: Runner, source: str) -> None:
    """Let a run load ``source``, which was moved."""
    runner._load_from = source


def loops(runner: Runner) -> dict[str, BaseLoop]:
    """Return the loops that a run has built so far, of 'train', 'val' and 'test'."""
    candidates = {
        'train': runner._train_loop,
        'val': runner._val_loop,
        'test': runner._test_loop,
    }
    return {task: loop for task, loop in candidates.items() if isinstance(loop, BaseLoop)}


def trains(runner: Runner) -> bool:
    """Return whether a run is a training, whose loop mmengine builds before it calls hooks."""
    return 'train' in loops(runner)


def train_dataloader_settings(runner: Runner) -> Any:
    """Return ``train_dataloader`` as the config gives it, even after the loader was built."""
    return runner._train_dataloader


def decide_val_interval(loop: BaseLoop) -> None:
    """Let a training loop set ``val_interval`` to what ``dynamic_intervals`` say for now."""
    loop._decide_current_val_interval()


# Models and optimizer wrappers


def run_forward(model: BaseModel, data: Any, mode: str) -> Any:
    """Call a model on what its data preprocessor returned, a dict or a sequence."""
    return model._run_forward(data, mode=mode)


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """Return how many iterations add their gradients up for one step; 1 if there is no saying."""
    return getattr(wrapper, '_accumulative_counts', 1)


def normalizes(preprocessor: nn.Module) -> bool | None:
    """Return whether a data preprocessor applies ``mean`` and ``std``; None if it has no such."""
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


def checkpoint_schemes() -> dict[str, Callable]:
    """Return a copy of the table of loaders by the prefixes of file names that they read."""
    return dict(CheckpointLoader._schemes)


def checkpoint_loader(source: str) -> Callable:
    """Return the loader that mmengine takes for a file name."""
    return CheckpointLoader._get_checkpoint_loader(source)
