"""What resuming takes from a checkpoint, and where the config of the resumed run counts instead."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.optim import Optimizer

from ...weights import containers
from ...weights.errors import CheckpointError, shown

# of a scheduler: how far it is. Everything else in its state says how long it is, and how high.
_PROGRESS = {'last_step', '_global_step', '_last_value', 'verbose'}
# of a scheduler that looks at metrics, which cannot be replayed
_PLATEAU = 'num_bad_epochs'


def require_training(checkpoint: Mapping, source: Any) -> None:
    """Check that a checkpoint holds the state of a training.

    Raises:
        CheckpointError: If it does not.
    """
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    is_whole = (
        isinstance(meta, Mapping)
        and all(type(meta.get(key)) is int for key in ('epoch', 'iter'))
        and isinstance(hub, Mapping)
        and all(isinstance(hub.get(part), Mapping) for part in ('log_scalars', 'runtime_info'))
    )
    if not is_whole:
        raise CheckpointError(
            f'{source} holds no state of a training that could be resumed: to start from its '
            'weights, give it as load_from without --resume'
        )


def folders(runner: Runner) -> list[Path]:
    """Return where a run keeps its checkpoints."""
    work_dir = Path(runner.work_dir)
    found = [work_dir]
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir:
            found += [Path(hook.out_dir) / work_dir.name, Path(hook.out_dir)]
    return found


def keep_files_inside(checkpoint: Mapping, within: Iterable[Path]) -> None:
    """Let other files that a checkpoint names count by their names, inside the folders of the run.

    mmengine removes the previous best checkpoint and those beyond the number to keep. A best
    checkpoint that is damaged is no longer one: the next validation saves another.
    """
    within = list(within)
    hub = checkpoint['message_hub']
    info = hub['runtime_info']
    for key in [key for key in info if str(key).startswith(('best_ckpt', 'last_ckpt'))]:
        path = _inside(info.pop(key), within)
        is_best = key.startswith('best_ckpt')
        if path is None or (is_best and not path.name.startswith('best_')):
            continue
        problem = containers.damage(path) if is_best else None
        if problem is None:
            info[key] = str(path)
            continue
        info.pop(key.replace('best_ckpt', 'best_score', 1), None)
        print_log(
            f'{path} is {problem}: the next validation saves a new best checkpoint',
            logger='current',
            level=logging.WARNING,
        )
    resumed = hub.get('resumed_keys')
    if isinstance(resumed, dict):  # mmengine warns of each that is not there
        known = {**hub['log_scalars'], **info}
        hub['resumed_keys'] = {key: value for key, value in resumed.items() if key in known}
    if 'keep_ckpt_ids' in info:
        kept = info['keep_ckpt_ids']
        kept = kept if isinstance(kept, (list, tuple)) else []
        info['keep_ckpt_ids'] = [step for step in kept if type(step) is int]


def _inside(path: Any, within: list[Path]) -> Path | None:
    """Return the file of a path's name inside the folders of a run, if there is one."""
    name = Path(path).name if isinstance(path, str) and '\0' not in path else ''
    if not name.endswith('.pth'):
        return None
    return next((folder / name for folder in within if (folder / name).is_file()), None)


# ------------------------------------------------------------------------------------------------
# Settings that changed
# ------------------------------------------------------------------------------------------------


def settings_of(runner: Runner) -> dict[str, int]:
    """Return what a checkpoint says of the length of its run, and of the size of the data."""
    loop, dataset = runner.train_loop, runner.train_dataloader.dataset
    settings = {'samples': len(dataset)} if hasattr(dataset, '__len__') else {}
    # by epoch, the number of iterations follows from the data
    name = 'max_epochs' if isinstance(loop, EpochBasedTrainLoop) else 'max_iters'
    settings[name] = getattr(loop, name)
    return settings


class Continuation:
    """A run that goes on with the settings of its own config: which differ, and what follows.

    Learning rates, weight decay and schedules are those of the config. As long as they are the
    checkpoint's too, its state is taken over as it is. Where they are not, the schedule of the
    config is replayed up to where the checkpoint is.

    Args:
        runner: About to resume, with optimizer and schedulers of its config.
        checkpoint: To be resumed from; what the config decides is changed in it.
        source: The file, for messages.
        saved: What :func:`settings_of` returned when it was saved.

    Raises:
        CheckpointError: If its optimizer is of other parameters.
    """

    def __init__(self, runner: Runner, checkpoint: dict, source: Any, saved: Mapping[str, int]):
        self.runner, self.source = runner, source
        self.changes: list[str] = []
        self._replay: Callable[[], None] | None = None
        meta = checkpoint['meta']
        self.done = {'max_iters': meta['iter'], 'max_epochs': meta['epoch']}
        self.settings = settings_of(runner)
        for name, value in self.settings.items():
            if saved.get(name, value) != value:
                self.changes.append(f'{name} {saved[name]} -> {value}')
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper) and 'optimizer' in checkpoint:
            self._compare_groups(wrapper.optimizer, checkpoint['optimizer'])
            if isinstance(runner.param_schedulers, list) and 'param_schedulers' in checkpoint:
                self._compare_schedulers(wrapper.optimizer, checkpoint)

    def apply(self) -> None:
        """Put the schedule of the config where it would be, and log what changed in one line."""
        if self._replay is not None:
            self._replay()
        logger = self.runner.logger
        if self.changes:
            logger.warning(
                f'The config differs from that of the checkpoint {self.source}, and counts: '
                f'{"; ".join(self.changes)}'
            )
        for name, done in self.done.items():
            if done > self.settings.get(name, done):
                logger.warning(
                    f'{name} is {self.settings[name]}, and the checkpoint {self.source} is at '
                    f'{done}: nothing is left to train'
                )

    def _compare_groups(self, optimizer: Optimizer, state: Mapping) -> None:
        own, saved = optimizer.param_groups, state.get('param_groups', [])
        sizes = [[len(group['params']) for group in groups] for groups in (saved, own)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f'{self.source}: its optimizer has groups of {shown(sizes[0])} parameters, and '
                f'this run has groups of {shown(sizes[1])}: resume with the config of the '
                'checkpoint, or give it as load_from without --resume'
            )
        for name in ('lr', 'weight_decay'):
            found = []
            for mine, theirs in zip(own, saved):
                key = f'initial_{name}' if f'initial_{name}' in mine else name
                if key in mine and theirs.get(key, mine[key]) != mine[key]:
                    found.append(f'{theirs[key]:g} -> {mine[key]:g}')
                    theirs[key] = mine[key]
            if found:
                more = f' and of {len(found) - 1} more groups' if len(found) > 1 else ''
                self.changes.append(f'{name} {found[0]}{more}')

    def _compare_schedulers(self, optimizer: Optimizer, checkpoint: dict) -> None:
        own, saved = self.runner.param_schedulers, checkpoint['param_schedulers']
        if [type(scheduler) for scheduler in own] == [dict] * len(own):
            return  # not built
        found = []
        if len(own) != len(saved):
            found.append(f'{len(saved)} parts -> {len(own)}')
        for scheduler, state in zip(own, saved):
            mine = _plain_state(scheduler)
            for key in sorted(mine.keys() - _PROGRESS):
                old, new = state.get(key, 'none'), mine[key]
                if old != new:
                    found.append(f'{key} of {type(scheduler).__name__} {old} -> {new}')
        if not found:
            return
        more = f' and {len(found) - 3} more' if len(found) > 3 else ''
        self.changes.append(f'schedule: {", ".join(shown(one, 60) for one in found[:3])}{more}')
        checkpoint['param_schedulers'] = [
            state if _PLATEAU in state else {} for state in (*saved[: len(own)], *[{}] * len(own))
        ][: len(own)]
        names = {scheduler.param_name for scheduler in own}
        if 'momentum' in names:
            names.add('betas')
        values = [
            {k: v for k, v in group.items() if k in names} for group in optimizer.param_groups
        ]

        def replay() -> None:
            for group, first in zip(optimizer.param_groups, values):
                group.update(first)
            meta = {True: self.done['max_epochs'], False: self.done['max_iters']}
            steps = {
                scheduler: meta[scheduler.by_epoch]
                for scheduler in own
                if not hasattr(scheduler, _PLATEAU)
            }
            _step_together(steps)

        self._replay = replay


def _plain_state(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}


def _step_together(steps: Mapping[Any, int]) -> None:
    """Step schedulers as often as said, those with fewer steps at the ends of their epochs."""
    most = max(steps.values(), default=0)
    done = dict.fromkeys(steps, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's order of steps of optimizer and scheduler
        for number in range(1, most + 1):
            for scheduler, count in steps.items():
                while done[scheduler] < number * count // most:
                    scheduler.step()
                    done[scheduler] += 1
