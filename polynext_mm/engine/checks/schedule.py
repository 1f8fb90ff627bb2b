"""Check that schedules fit the length of the training, and that checkpoints are saved at all."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from .walk import DEFAULT_HOOKS, find_type, loop_type, schedulers

_LENGTHS = {
    'IterBasedTrainLoop': ('iterations', 'max_iters'),
    'EpochBasedTrainLoop': ('epochs', 'max_epochs'),
}
# Share of a training after the end of its schedule that is too small to report.
_TAIL = 0.01
_HOOK = 'default_hooks.checkpoint'


def schedule_problems(cfg: Config) -> Iterator[str]:
    """Find learning rates that never change, or that are 0 before the training ends."""
    length = _length(cfg)
    if length is None:
        return
    unit, total = length
    found = [(path, settings) for path, settings, *_ in schedulers(cfg.get('param_scheduler'))]
    for path, settings in found:
        by_epoch = settings.get('by_epoch', True)
        if by_epoch and unit == 'iterations':
            yield (
                f'{path} ({settings.get("type")}) counts epochs, of which training by iterations '
                f'has one: it would never change anything; set {path}.by_epoch=False'
            )
        elif bool(by_epoch) == (unit == 'epochs') and _is_short_cycle(settings, total):
            yield (
                f'{path}.total_steps={settings["total_steps"]}, and the training has {total} '
                f'{unit}: OneCycleLR stops it there with an error; set {path}.total_steps={total}'
            )
        elif bool(by_epoch) == (unit == 'epochs') and _ends_at_zero(settings):
            end = settings.get('end')
            if not isinstance(end, (int, float)) or total - end <= _TAIL * total:
                continue
            if any(isinstance(s.get('begin'), int) and s['begin'] >= end for _, s in found):
                continue  # another scheduler continues
            yield (
                f'{path}.end={end}, and the training has {total} {unit}: the learning rate would '
                f'be 0 for the last {total - end}; set {path}.end={total}'
            )


def _length(cfg: Config) -> tuple[str, int] | None:
    """Return the unit and the length of the training; None if they are not known."""
    loop = cfg.get('train_cfg')
    kind = loop_type('train', loop) if isinstance(loop, Mapping) else None
    if not isinstance(kind, str) or kind not in _LENGTHS:
        return None
    unit, option = _LENGTHS[kind]
    total = loop.get(option)
    return (unit, total) if isinstance(total, int) and total > 0 else None


def _ends_at_zero(settings: Mapping) -> bool:
    kind = str(settings.get('type'))
    if kind in ('PolyLR', 'CosineAnnealingLR'):
        return not settings.get('eta_min') and not settings.get('eta_min_ratio')
    return kind == 'LinearLR' and settings.get('end_factor', 1.0) == 0


def _is_short_cycle(settings: Mapping, total: int) -> bool:
    """Return whether a training needs more steps than its one-cycle schedule has."""
    steps, end = settings.get('total_steps'), settings.get('end', math.inf)
    return (
        str(settings.get('type')).startswith('OneCycle')
        and not settings.get('convert_to_iter_based')
        and isinstance(steps, int)
        and isinstance(end, (int, float))
        and steps < min(total, end) - settings.get('begin', 0)
    )


def saving_problems(cfg: Config) -> Iterator[str]:
    """Find settings that save nothing, or with which the checkpoint hook cannot be built."""
    hooks = cfg.get('default_hooks') or {}
    if not isinstance(cfg.get('train_cfg'), Mapping):
        return
    if 'checkpoint' in hooks and hooks['checkpoint'] is None:
        if not any('Checkpoint' in str(_type(hook)) for hook in cfg.get('custom_hooks') or ()):
            print_log(
                f'{_HOOK}=None: no checkpoint of this training will be saved',
                logger='current',
                level=logging.WARNING,
            )
        return
    hook = hooks.get('checkpoint')
    if not isinstance(hook, Mapping):
        return
    yield from _saved_by_epoch(cfg, hook)
    yield from _never_saved(cfg, hook)
    unknown = list(_unknown_metrics(cfg, hook.get('save_best')))
    yield from unknown
    if not unknown and hook.get('save_best') is not None:
        yield from _without_rule(cfg, hook)


def _type(hook: Any) -> Any:
    return hook.get('type') if isinstance(hook, Mapping) else type(hook).__name__


def _saved_by_epoch(cfg: Config, hook: Mapping) -> Iterator[str]:
    interval = hook.get('interval')
    if isinstance(interval, (int, float)) and interval > 1 and hook.get('by_epoch', True):
        if loop_type('train', cfg['train_cfg']) == 'IterBasedTrainLoop':
            yield (
                f'{_HOOK}.interval={interval} counts epochs, of which training by iterations has '
                f'one: nothing would be saved before its end; set {_HOOK}.by_epoch=False'
            )


def _never_saved(cfg: Config, hook: Mapping) -> Iterator[str]:
    length = _length(cfg)
    if length is None:
        return
    unit, total = length
    save_best, begin = hook.get('save_best'), cfg['train_cfg'].get('val_begin', 1)
    # val_cfg=None leaves out validation on purpose; save_best may come from a base config
    too_late = isinstance(begin, int) and begin > total
    if save_best is not None and cfg.get('val_cfg') is not None and too_late:
        yield (
            f'{_HOOK}.save_best={save_best!r}, and no validation takes place '
            f'(train_cfg.val_begin={begin} of {total} {unit}): leave save_best out, or set '
            'val_begin'
        )
    interval, first = hook.get('interval', -1), hook.get('save_begin', 0)
    saves_best = save_best is not None and cfg.get('val_cfg') is not None
    if hook.get('save_last', True) or saves_best or not isinstance(interval, int):
        return
    if interval < 1:
        print_log(
            f'{_HOOK}.save_last=False with interval={interval}: no checkpoint of this training '
            'will be saved',
            logger='current',
            level=logging.WARNING,
        )
        return
    comparable = bool(hook.get('by_epoch', True)) == (unit == 'epochs')
    late = max(interval, first if isinstance(first, int) else 0)
    if comparable and late > total:
        yield (
            f'{_HOOK}.save_last=False with interval={interval}: nothing of {total} {unit} would be '
            f'saved; set {_HOOK}.save_last=True'
        )


def _without_rule(cfg: Config, hook: Mapping) -> Iterator[str]:
    """Report a ``save_best`` without a known rule, by building the hook, which has the rules."""
    kind = hook.get('type', DEFAULT_HOOKS['checkpoint'])
    factory = find_type(HOOKS, kind, cfg) if isinstance(kind, str) else kind
    if not (isinstance(factory, type) and issubclass(factory, CheckpointHook)):
        return
    options = {key: value for key, value in hook.items() if key not in ('type', 'priority')}
    try:
        factory(**options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error.args[0] if error.args else error).split())
        yield (
            f'{_HOOK}.save_best={hook["save_best"]!r}, rule={hook.get("rule")!r}: {reason} Set '
            f"{_HOOK}.rule to 'greater' or 'less', whichever is better"
        )


def _unknown_metrics(cfg: Config, save_best: Any) -> Iterator[str]:
    """Report unknown metrics in ``save_best``, which fail only after the first validation."""
    names = metric_names(cfg.get('val_evaluator'))
    wanted = [save_best] if isinstance(save_best, str) else save_best or ()
    for name in wanted:
        if names and name != 'auto' and name not in names:
            nearest = difflib.get_close_matches(name, names, 1, 0.5)
            remedy = f'did you mean {nearest[0]}?' if nearest else f'there are {", ".join(names)}'
            yield f'{_HOOK}.save_best={name}: no such metric; {remedy}'


def metric_names(evaluators: Any) -> list[str] | None:
    """Return the names that IoUMetric and CocoMetric report; None if there are other metrics."""
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    names: list[str] = []
    for evaluator in evaluators or ():
        kind = str(evaluator.get('type')).split('.')[-1] if isinstance(evaluator, Mapping) else None
        prefix = f'{evaluator.get("prefix")}/' if kind and evaluator.get('prefix') else ''
        if kind == 'IoUMetric':
            found = ['aAcc']
            for metric in evaluator.get('iou_metrics', ['mIoU']):
                found += {
                    'mIoU': ['mIoU', 'mAcc'],
                    'mDice': ['mDice', 'mAcc'],
                    'mFscore': ['mFscore', 'mPrecision', 'mRecall'],
                }.get(metric, [])
        elif kind == 'CocoMetric' and not evaluator.get('classwise'):
            prefix = prefix or 'coco/'
            metrics = evaluator.get('metric', 'bbox')
            metrics = [metrics] if isinstance(metrics, str) else metrics
            if set(metrics) - {'bbox', 'segm'} or evaluator.get('metric_items'):
                return None
            sizes = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
            found = [f'{metric}_{size}' for metric in metrics for size in sizes]
        else:
            return None
        names += [prefix + name for name in found]
    return names or None
