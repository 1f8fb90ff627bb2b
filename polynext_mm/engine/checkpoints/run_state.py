"""What a resumed file says of optimizer, schedulers and average, held against those of the run.

mmengine and torch take these over with few checks: a moment of another shape is broadcast, a
scheduler that is missing keeps its first step, and an odd value ends in a traceback that names no
file. Everything that is read later is checked here, and what honest files of older versions lack
stays as the run has it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...weights import loading
from ...weights.errors import CheckpointError, shown
from ...weights.tensor_checks import require_loadable, require_tensors
from .. import models

# options that choose kernels, and leave the state as it is
_KERNELS = ('foreach', 'fused', 'capturable')
# of a scheduler: where it is, without which it would start again
_PLACE = ('last_step', '_global_step')
# of a scheduler: a number for each group of parameters
_BY_GROUP = ('base_values', '_last_value')


def require_of_run(runner: Any, checkpoint: dict, source: Any) -> None:
    """Check what resuming hands to the average, optimizer and schedulers of a run, if it has them.

    The state of the optimizer is checked when it is loaded, since parameters then have the sizes
    of the checkpoint's.

    Args:
        runner: mmengine's Runner, which is about to resume.
        checkpoint: What :func:`resuming.needed` returns.
        source: The file, for messages.

    Raises:
        CheckpointError: If a part is not one of this run's; the optimizer raises it later.
    """
    _require_average(runner, checkpoint, source)
    if 'param_schedulers' in checkpoint:
        _require_schedulers(runner, checkpoint['param_schedulers'], source)
    if 'optimizer' in checkpoint:
        _guard_optimizers(runner, checkpoint['optimizer'], source)


# The average


def _require_average(runner: Any, checkpoint: dict, source: Any) -> None:
    from mmengine.hooks import EMAHook

    hook = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
    model = models.unwrapped(runner.model)
    if hook is None or 'ema_state_dict' not in checkpoint or not models.has_ours(model):
        return
    source = f'{source} (ema_state_dict)'
    average = checkpoint['ema_state_dict']
    require_tensors(average, source)
    own = hook.ema_model.state_dict() if hasattr(hook, 'ema_model') else {}
    counters = {key: value for key, value in average.items() if not key.startswith('module.')}
    weights = {
        key.removeprefix('module.'): value
        for key, value in average.items()
        if key.startswith('module.')
    }
    known = {key: value for key, value in counters.items() if key in own}
    loading.raise_unless_equal(own, known, [], source, lambda: _ELSE)
    require_loadable(own, known, source)
    # mmengine exchanges the two, name by name
    beside = checkpoint['state_dict']
    missing = [key for key in beside if key not in weights]
    loading.raise_unless_equal(beside, weights, missing, source, lambda: _ELSE)
    backbones = models.backbones(model)
    for name, backbone in backbones.items():
        backbone.adapt(dict(weights), f'{name}.' if name else '', source)
    if '' not in backbones:
        loading.check(model, weights, source, backbones=backbones)


_ELSE = 'resume from another checkpoint, or give this one as load_from without --resume'


# The optimizer


def _guard_optimizers(runner: Any, state: Mapping, source: Any) -> None:
    from mmengine.optim import OptimWrapper, OptimWrapperDict

    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        if set(state) != set(wrapper.keys()):
            raise CheckpointError(
                f'{source}: optimizer has {_listed(state)}, and this run has '
                f'{_listed(wrapper.keys())}: {_ELSE}'
            )
        parts = {f'optimizer.{name}': (one, state[name]) for name, one in wrapper.items()}
    elif isinstance(wrapper, OptimWrapper):
        parts = {'optimizer': (wrapper, state)}
    else:  # not built: for an evaluation
        return
    names = {param: name for name, param in models.unwrapped(runner.model).named_parameters()}
    for place, (one, own) in parts.items():
        _require(isinstance(own, Mapping), source, place, 'is no dict')
        for key, kind in (('state', Mapping), ('param_groups', list)):
            found = own.get(key)
            _require(isinstance(found, kind), source, f'{place}.{key}', _is_no(found, kind))
        if 'loss_scaler' in own:
            _require_scaler(one, own['loss_scaler'], source, f'{place}.loss_scaler')
        if own.get('base_param_settings') is not None:
            where = f'{place}.base_param_settings'
            settings = own['base_param_settings']
            _require(isinstance(settings, Mapping), source, where, _is_no(settings, Mapping))
            _require_options(one.base_param_settings or {}, settings, source, where)
        _check_when_loaded(one.optimizer, names, source, place)


def _check_when_loaded(
    optimizer: Optimizer, names: Mapping[Tensor, str], source: Any, place: str
) -> None:
    due = [True]

    def check(_: Optimizer, state_dict: dict) -> None:
        if due:  # a hook cannot be removed while it runs
            due.clear()
            _require_optimizer(optimizer, state_dict, names, source, place)

    optimizer.register_load_state_dict_pre_hook(check, prepend=True)


def _require_scaler(wrapper: Any, saved: Any, source: Any, place: str) -> None:
    from mmengine.optim import AmpOptimWrapper

    own = getattr(wrapper, 'loss_scaler', None)
    _require(isinstance(saved, Mapping), source, place, _is_no(saved, Mapping))
    if not hasattr(own, 'is_enabled') or not own.is_enabled():
        return
    # of a run without scaling: our wrapper keeps its own scale, mmengine's cannot
    can_start = saved or not isinstance(wrapper, AmpOptimWrapper)
    _require(can_start, source, place, 'is empty, as of a training without loss scaling')
    for key in own.state_dict() if saved else ():
        number = saved.get(key)
        is_counter = key == '_growth_tracker'
        fits = _is_number(number) and number >= 0 and (is_counter or number > 0)
        _require(fits, source, f'{place}.{key}', f'is {_of(number)}, not a positive number')


def _require_optimizer(
    optimizer: Optimizer, saved: Mapping, names: Mapping[Tensor, str], source: Any, place: str
) -> None:
    groups, own_groups = saved['param_groups'], optimizer.param_groups
    sizes = [len(group['params']) for group in own_groups]
    numbers = [_numbers(group) for group in groups]
    if None in numbers or [len(each) for each in numbers] != sizes:
        found = [None if each is None else len(each) for each in numbers]
        raise CheckpointError(
            f'{source}: {place}.param_groups has groups of {shown(found)} parameters, and this '
            f'run has groups of {shown(sizes)}: {_ELSE}'
        )
    known = [number for each in numbers for number in each]
    _require(len(set(known)) == len(known), source, f'{place}.param_groups', 'repeats a parameter')
    for index, (own, group) in enumerate(zip(own_groups, groups)):
        _require_options(own, group, source, f'{place}.param_groups[{index}]')
    unknown = [key for key in saved['state'] if key not in set(known)]
    _require(not unknown, source, f'{place}.state', f'is of other parameters: {_listed(unknown)}')
    left = _left_by_a_step(optimizer, groups, source, f'{place}.param_groups')
    for own, each, pattern in zip(own_groups, numbers, left):
        for param, number in zip(own['params'], each):
            state = saved['state'].get(number)
            where = f'{place}.state[{number}]'
            if state is not None:
                _require(isinstance(state, Mapping), source, where, _is_no(state, Mapping))
            if state:  # none yet, or an empty one, is of a parameter that had no gradient
                what = f'{where}, of {names[param]},' if param in names else where
                _require_state(param, state, pattern, source, what)


def _numbers(group: Any) -> list[int] | None:
    numbers = group.get('params') if isinstance(group, Mapping) else None
    is_list = isinstance(numbers, (list, tuple)) and all(type(number) is int for number in numbers)
    return list(numbers) if is_list else None


def _require_options(own: Mapping, saved: Mapping, source: Any, place: str) -> None:
    """Check options of a group of parameters; those that are not there, torch sets."""
    for key, value in own.items():
        if key == 'params' or key not in saved or key in _KERNELS:
            continue
        problem = _unlike(value, saved[key])
        if problem is None and _is_number(value) and value >= 0 and saved[key] < 0:
            problem = f'is {_of(saved[key])}, and must not be negative'
        _require(problem is None, source, f'{place}.{key}', problem)


def _left_by_a_step(
    optimizer: Optimizer, groups: list[dict], source: Any, place: str
) -> list[dict[str, Any]]:
    """Return what a step leaves for a parameter of shape (2, 3) of each group, if it can be told.

    Raises:
        CheckpointError: If the optimizer cannot step with the options of ``groups``.
    """
    try:
        _stepped(optimizer, optimizer.param_groups)
    except Exception:  # noqa: BLE001 - of an optimizer that cannot be copied, less is checked
        return [{}] * len(groups)
    try:
        return _stepped(optimizer, groups)
    except Exception as error:  # noqa: BLE001 - anything may be missing or odd
        reason = f'{type(error).__name__}: {shown(str(error))}'
        raise CheckpointError(
            f'{source}: {place} has options with which {type(optimizer).__name__} cannot step '
            f'({reason}): {_ELSE}'
        ) from error


def _stepped(optimizer: Optimizer, groups: list[dict]) -> list[dict[str, Any]]:
    params = [nn.Parameter(torch.zeros(2, 3)) for _ in groups]
    for param in params:
        param.grad = torch.zeros_like(param)
    twin = copy.copy(optimizer)
    own = [
        {key: False if key in _KERNELS else value for key, value in group.items()}
        | {'params': [param]}
        for group, param in zip(groups, params)
    ]
    twin.__setstate__(dict(state=defaultdict(dict), param_groups=own))
    twin.step()
    return [dict(twin.state[param]) for param in params]


def _require_state(
    param: Tensor, state: Mapping, pattern: Mapping[str, Any], source: Any, place: str
) -> None:
    for key, left in pattern.items():
        found = state.get(key)
        where = f'{place} {key}'
        if isinstance(left, Tensor) and left.shape == (2, 3):
            fits = isinstance(found, Tensor) and found.shape == param.shape
            _require(fits, source, where, f'is {_of(found)} instead of {tuple(param.shape)}')
        elif key == 'step' or _is_number(left):
            fits = _is_number(found) and (key != 'step' or found >= 0)
            _require(fits, source, where, f'is {_of(found)}, not a number from 0 up')
    for key, value in state.items():
        if not isinstance(value, Tensor) or key == 'step':
            continue
        where = f'{place} {shown(key)}'
        pattern_value = pattern.get(key)
        floats = not isinstance(pattern_value, Tensor) or pattern_value.is_floating_point()
        if key in pattern and floats:
            _require(value.is_floating_point(), source, where, f'is {value.dtype}')
        if value.is_floating_point():
            values = value.float() if value.dtype.itemsize == 1 else value
            _require(bool(values.isfinite().all()), source, where, 'is not finite (nan or inf)')
            squares = key.endswith('_sq') or key.startswith('square')
            if squares and key in pattern:
                _require(not (values < 0).any(), source, where, 'has negative squares')


# Schedulers


def _require_schedulers(runner: Any, saved: Any, source: Any) -> None:
    own = runner.param_schedulers
    place = 'param_schedulers'
    if isinstance(own, dict):
        fits = isinstance(saved, Mapping) and set(saved) == set(own)
        _require(fits, source, place, f'is not of the optimizers {_listed(own)} that this run has')
        pairs = [(f'{place}.{name}', own[name], saved[name]) for name in own]
    elif isinstance(own, list):
        pairs = [(place, own, saved)]
    else:
        return
    for where, schedulers, states in pairs:
        if not all(hasattr(scheduler, 'state_dict') for scheduler in schedulers):
            return  # not built
        _require(isinstance(states, list), source, where, _is_no(states, list))
        _require(
            len(states) == len(schedulers),
            source,
            where,
            f'has {len(states)} schedulers, and this run has {len(schedulers)}',
        )
        for index, (scheduler, state) in enumerate(zip(schedulers, states)):
            _require_scheduler(scheduler, state, source, f'{where}[{index}]')


def _require_scheduler(scheduler: Any, saved: Any, source: Any, place: str) -> None:
    _require(isinstance(saved, Mapping), source, place, _is_no(saved, Mapping))
    own = scheduler.state_dict()
    for key in _PLACE:
        if key in own:
            found = saved.get(key)
            # before the first step it is -1
            fits = type(found) is int and -1 <= found < 2**32
            _require(fits, source, f'{place}.{key}', f'is {_of(found)}, not a number of steps')
    for key, value in saved.items():
        where = f'{place}.{shown(key)}'
        if key in own:
            changed = value is None and key.startswith('eta_min')  # by another config
            problem = None if changed else _unlike(own[key], value, key in _BY_GROUP)
            _require(problem is None, source, where, problem)
        else:
            is_method = isinstance(key, str) and inspect.getattr_static(scheduler, key, None)
            _require(not is_method, source, where, 'is no value of a scheduler')


# Values


def _unlike(own: Any, saved: Any, same_length: bool = True) -> str | None:
    """Return how a value differs in kind from the one that a run has, if it does."""
    if _is_number(own, finite=False):
        finite = _is_number(own)
        return None if _is_number(saved, finite) else f'is {_of(saved)}, not a number'
    if isinstance(own, bool):
        return None if saved is None or isinstance(saved, bool) else f'is {_of(saved)}, not a bool'
    if isinstance(own, str):
        return None if isinstance(saved, str) else f'is {_of(saved)}, not a text'
    if isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)):
            return f'is {_of(saved)}, not a list'
        if same_length and len(saved) != len(own):
            return f'has {len(saved)} values instead of {len(own)}'
        if own and all(_is_number(value) for value in own):
            odd = [value for value in saved if not _is_number(value)]
            return f'holds {_of(odd[0])}, not a number' if odd else None
    if isinstance(own, Mapping) and not isinstance(saved, Mapping):
        return f'is {_of(saved)}, not a dict'
    return None


def _is_number(value: Any, finite: bool = True) -> bool:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
            return False
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not finite or math.isfinite(value)


def _of(value: Any) -> str:
    """Describe a value in a few words."""
    if value is None:
        return 'missing'
    if isinstance(value, Tensor):
        return f'{value.dtype} of {tuple(value.shape)}' if value.numel() != 1 else f'{value.item()}'
    if isinstance(value, (bool, int, float, str)):
        return shown(repr(value), 40)
    return f'a {type(value).__name__}'


def _is_no(value: Any, kind: type) -> str:
    return f'is {_of(value)}, not a {"dict" if kind is Mapping else kind.__name__}'


def _listed(names: Any) -> str:
    names = list(names)
    return shown(', '.join(shown(str(name), 40) for name in names[:8])) or 'none'


def _require(fits: bool, source: Any, place: str, problem: str | None) -> None:
    if not fits:
        raise CheckpointError(f'{source}: {place} {problem}: {_ELSE}')
