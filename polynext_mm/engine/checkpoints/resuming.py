"""What a resumed run takes from its checkpoint, and where its config takes precedence."""

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

# The part of a scheduler's state that records progress; the rest defines the schedule.
_PROGRESS = {'last_step', '_global_step', '_last_value', 'verbose'}
# state that marks a scheduler driven by metrics, which cannot be replayed
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
    """Return the folders in which a run keeps its checkpoints."""
    work_dir = Path(runner.work_dir)
    found = [work_dir]
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir:
            found += [Path(hook.out_dir) / work_dir.name, Path(hook.out_dir)]
    return found


def keep_files_inside(checkpoint: Mapping, within: Iterable[Path]) -> None:
    """Restrict the files that a checkpoint lists to those with the same names in the run's folders.

    mmengine removes such files: the previous best checkpoint, and those beyond the number to keep.
    A damaged best checkpoint is dropped, so that the next validation saves another.
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
    if isinstance(resumed, dict):  # mmengine warns about each missing file
        known = {**hub['log_scalars'], **info}
        hub['resumed_keys'] = {key: value for key, value in resumed.items() if key in known}
    if 'keep_ckpt_ids' in info:
        kept = info['keep_ckpt_ids']
        kept = kept if isinstance(kept, (list, tuple)) else []
        info['keep_ckpt_ids'] = [step for step in kept if type(step) is int]


def _inside(path: Any, within: list[Path]) -> Path | None:
    """Return the file in one of a run's folders with the same name as a path, if there is one."""
    name = Path(path).name if isinstance(path, str) and '\0' not in path else ''
    if not name.endswith('.pth'):
        return None
    return next((folder / name for folder in within if (folder / name).is_file()), None)


# ------------------------------------------------------------------------------------------------
# Settings that changed
# ------------------------------------------------------------------------------------------------


def settings_of(runner: Runner) -> dict[str, int]:
    """Return the length of a run and the size of its data, to be saved in its checkpoints."""
    loop, dataset = runner.train_loop, runner.train_dataloader.dataset
    settings = {'samples': len(dataset)} if hasattr(dataset, '__len__') else {}
    # with epochs, the number of iterations follows from the size of the data
    name = 'max_epochs' if isinstance(loop, EpochBasedTrainLoop) else 'max_iters'
    settings[name] = getattr(loop, name)
    return settings


class Continuation:
    """Resume a run with the settings of its own config, even where the checkpoint's differ.

    Learning rates, weight decay and schedules come from the config. If the checkpoint's are the
    same, its state is used unchanged; otherwise the config's schedule is replayed up to the
    iteration or epoch of the checkpoint.

    Args:
        runner: About to resume, with the optimizer and schedulers of its config.
        checkpoint: The checkpoint to resume from; what the config decides is changed in place.
        source: The file, for messages.
        saved: What :func:`settings_of` returned when it was saved.

    Raises:
        CheckpointError: If its optimizer has other parameters than the run's.
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
        """Advance the config's schedule to the checkpoint, and log what changed in one line."""
        if self._replay is not None:
            self._replay()
        logger = self.runner.logger
        if self.changes:
            logger.warning(
                f'The config differs from the checkpoint {self.source} and takes precedence: '
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
    """Step each scheduler the given number of times, interleaved as they were in training."""
    most = max(steps.values(), default=0)
    done = dict.fromkeys(steps, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns that the optimizer has not stepped first
        for number in range(1, most + 1):
            for scheduler, count in steps.items():
                while done[scheduler] < number * count // most:
                    scheduler.step()
                    done[scheduler] += 1
