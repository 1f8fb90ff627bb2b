"""Checks of a config before anything is built from it.

They find settings that nothing reads, options that a class does not take, and heads whose number of
classes differs from the data's.

Nothing is built and no data is read, so the checks take a second and work for any config of mmseg
or mmdet. Whatever cannot be judged with certainty (a class that takes any keyword, a data set
whose classes are not known) passes.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...compat.mmengine import settings_of
from .model import (
    channel_problems,
    class_problems,
    palette_problems,
    start_problems,
    weight_problems,
)
from .model import (
    metainfo_of as metainfo_of,
)
from .schedule import saving_problems, schedule_problems
from .walk import (
    DEFAULT_HOOKS,
    TASKS,
    ConfigError,
    each,
    find_type,
    settings_built,
)
from .walk import (
    datasets_of as datasets_of,
)

# What mm's runners, inferencers and tools read besides the Runner's own arguments.
_READ_BY_TOOLS = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
)
# Settings of older releases that nothing reads anymore, and what replaced them.
_RENAMED = {
    'resume_from': 'resume=True and load_from',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger',
    'evaluation': 'val_evaluator and train_cfg.val_interval',
    'lr_config': 'param_scheduler',
    'optimizer_config': 'optim_wrapper',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'seed': 'randomness.seed',
    'gpu_ids': 'the launcher',
}
# Common config variables that mm does not read although their names resemble settings it reads.
_VARIABLES = tuple(f'{task}_pipeline' for task in TASKS)
# tools/ copies it into the data loaders and evaluators
_CARRIED_OVER = ('data_root',)
_ALIKE = (
    0.88  # of difflib: 'load_form' and 'load_from' are, 'tta_pipeline' and 'val_pipeline' are not
)
_ENV_OPTIONS = ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit')
_DICTS = (
    'auto_scale_lr',
    'default_hooks',
    'env_cfg',
    'log_processor',
    'model',
    'optim_wrapper',
    'randomness',
    *(f'{task}_{part}' for task in TASKS for part in ('cfg', 'dataloader')),
)
_LISTS_OR_DICTS = ('param_scheduler', *(f'{task}_evaluator' for task in TASKS))
_LARGEST_SEED = 2**32 - 1  # of NumPy
_DATALOADER_OPTIONS = {'dataset', 'num_batch_per_epoch', 'disable_subprocess_warning'} | set(
    inspect.signature(DataLoader.__init__).parameters
)


def override(cfg: Config, options: Mapping | None) -> None:
    """Merge settings of a command line into a config, in place.

    A setting that is None takes options, as an empty dict does; an ``init_cfg`` then gets the
    type Pretrained.

    Args:
        options: Dotted keys; numbers are indices into lists.

    Raises:
        ConfigError: If a key leads past the end of a list, or into what holds no settings.
    """
    for key, value in (options or {}).items():
        *outer, _ = key.split('.')
        node, path = settings_of(cfg), ''
        for part in outer:
            node = _inside(node, part, path, f'{key}={value}')
            path = f'{path}.{part}' if path else part
            if node is None:
                cfg.merge_from_dict({path: dict(_delete_=True)})
                if part == 'init_cfg':
                    cfg.merge_from_dict({f'{path}.type': 'Pretrained'})
                break
        else:
            _inside(node, key.split('.')[-1], path, f'{key}={value}')
        cfg.merge_from_dict({key: value})


def _inside(node: Any, part: str, path: str, wanted: str) -> Any:
    """Return what one part of a dotted key refers to; {} where nothing is set yet."""
    if isinstance(node, (list, tuple)):
        if part.isdecimal() and int(part) < len(node):
            return node[int(part)]
        last = f'the last is {path}.{len(node) - 1}' if node else 'it is empty'
        raise ConfigError(f'{wanted}: {path} is a list of {len(node)}, counted from 0; {last}')
    if not isinstance(node, Mapping):
        raise ConfigError(f'{wanted}: {path}={node!r} has no settings inside')
    return node.get(part, {})


def read_keys() -> set[str]:
    """Return the names of the top-level settings that mm reads."""
    arguments = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    return arguments | set(_READ_BY_TOOLS)


def check_config(
    cfg: Config, file_keys: Collection[str] | None = None, overrides: Mapping | None = None
) -> None:
    """Check everything that the config alone determines.

    Args:
        cfg: As it will be run.
        file_keys: Top-level names in the config file itself, without those that the command line
            added; all names in ``cfg`` by default.
        overrides: Settings from the command line, with dotted keys.

    Raises:
        ConfigError: If nothing reads a setting, or an option or number of classes cannot be right.
    """
    # the checks below look into these settings
    problems = [*_unwritable_names(cfg), *_wrong_kinds(cfg)] or [
        *_unknown_overrides(cfg, cfg.keys() if file_keys is None else file_keys, overrides or {}),
        *_misspelt_keys(cfg, overrides or {}),
        *_unknown_options(cfg),
        *_impossible_numbers(cfg),
        *schedule_problems(cfg),
        *saving_problems(cfg),
        *class_problems(cfg),
        *channel_problems(cfg),
        *start_problems(cfg),
        *weight_problems(cfg),
        *palette_problems(cfg),
    ]
    if problems:
        raise ConfigError(
            '\n  '.join(
                [f'{len(problems)} invalid setting{"s" if len(problems) > 1 else ""}:', *problems]
            )
        )


# Kinds of values


def _unwritable_names(cfg: Config) -> Iterator[str]:
    """Yield names that mmengine cannot write into a work dir's config, which is UTF-8."""
    for path, value in (('the config', cfg.filename), *_texts(settings_of(cfg))):
        try:
            # with LANG=C, Python does not decode UTF-8 names
            str(value).encode(errors='surrogateescape').decode()
        except UnicodeError:
            yield f'{path}={value!a}: the name is not UTF-8; rename the file or folder'


def _texts(node: Any, path: str = '') -> Iterator[tuple[str, str]]:
    items: Iterable = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    elif isinstance(node, str):
        yield path, node
    for key, value in items:
        yield from _texts(value, f'{path}.{key}' if path else str(key))


def _wrong_kinds(cfg: Config) -> Iterator[str]:
    """Yield settings of the wrong kind: not a dict, or not a list, where one is needed.

    Objects that are already built pass.
    """
    for name in _DICTS:
        if isinstance(cfg.get(name), (str, int, float, list, tuple)):
            yield f'{name}={cfg[name]!r}: it must be a dict of settings'
    for name in _LISTS_OR_DICTS:
        if isinstance(cfg.get(name), (str, int, float)):
            yield f'{name}={cfg[name]!r}: it must be a dict of settings, or a list of such'
    if not isinstance(cfg.get('default_scope'), (str, type(None))):
        yield f'default_scope={cfg.default_scope!r}: it must be the name of a package'
    hooks = cfg.get('custom_hooks')
    if isinstance(hooks, (str, int, float, Mapping)):
        yield f'custom_hooks={hooks!r}: it must be a list of hooks'
    named = {f'custom_hooks.{i}': hook for i, hook in enumerate(_list(hooks))}
    if isinstance(cfg.get('default_hooks'), Mapping):
        named |= {f'default_hooks.{name}': hook for name, hook in cfg.default_hooks.items()}
    for path, hook in named.items():
        if isinstance(hook, (str, int, float, list, tuple)):
            yield f'{path}={hook!r}: it must be a dict of settings'
    hook = named.get('default_hooks.checkpoint')
    save_best = hook.get('save_best') if isinstance(hook, Mapping) else None
    if save_best is not None and not _words(save_best):
        yield (
            f'default_hooks.checkpoint.save_best={save_best!r}: it must be the name of a metric, '
            "a list of names, or 'auto'"
        )
    for task in TASKS:
        evaluators = cfg.get(f'{task}_evaluator')
        for path, evaluator, *_ in each(f'{task}_evaluator', evaluators, METRICS):
            metrics = evaluator.get('iou_metrics', ())
            if isinstance(metrics, str) or not _words(metrics):
                yield f'{path}.iou_metrics={metrics!r}: it must be a list of names'


def _list(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else ()


def _words(value: Any) -> bool:
    """Return whether a value is a string or a list of strings."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)
    )


def _impossible_numbers(cfg: Config) -> Iterator[str]:
    """Yield numbers that would make loading, drawing or the optimizer fail only later."""
    for task in TASKS:
        path, loader = f'{task}_dataloader', cfg.get(f'{task}_dataloader')
        if not isinstance(loader, Mapping):
            continue
        yield from _not_whole(path, loader, 'batch_size', 1)
        yield from _not_whole(path, loader, 'num_workers', 0)
        if loader.get('persistent_workers') and loader.get('num_workers', 0) == 0:
            yield (
                f'{path}.persistent_workers={loader["persistent_workers"]} with num_workers=0: '
                f'there are no workers to keep; set {path}.persistent_workers=False'
            )
    for path, option, least, most in (
        ('randomness', 'seed', 0, _LARGEST_SEED),
        ('auto_scale_lr', 'base_batch_size', 1, math.inf),
    ):
        if isinstance(cfg.get(path), Mapping):
            yield from _not_whole(path, cfg[path], option, least, most)
    yield from _impossible_rates('optim_wrapper', cfg.get('optim_wrapper'))


def _not_whole(
    path: str, options: Mapping, option: str, least: int, most: float = math.inf
) -> Iterator[str]:
    value = options.get(option)
    if value is None or (type(value) is int and least <= value <= most):
        return
    bounds = f'{least} or more' if most == math.inf else f'{least} to {most}'
    yield f'{path}.{option}={value!r}: it must be a whole number, {bounds}'


def _impossible_rates(path: str, settings: Any) -> Iterator[str]:
    """Yield invalid learning rates of an optimizer, or of one of several."""
    if not isinstance(settings, Mapping):
        return
    rate = settings.get('lr')
    numeric = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if isinstance(rate, (str, bool, list, tuple, Mapping)) or (
        numeric and not 0 <= rate < math.inf  # also catches nan
    ):
        yield f'{path}.lr={rate!r}: it must be a number, 0 or more'
    for name, inner in settings.items():
        if name != 'paramwise_cfg':
            yield from _impossible_rates(f'{path}.{name}', inner)


# Names of settings


def _unknown_overrides(
    cfg: Config, file_keys: Collection[str], overrides: Mapping
) -> Iterator[str]:
    """Yield settings from the command line that are not in the file and that mm does not read."""
    known = read_keys()
    for key, value in overrides.items():
        name = key.split('.')[0]
        if name in known or name in _CARRIED_OVER:
            continue
        if name not in file_keys:
            yield f'{key}={value}: nothing reads {name}; {_suggest(name, key, cfg, known)}'
        elif name not in _RENAMED and _uses(cfg).count(name) > 1:
            yield (
                f'{key}={value}: {name} is a variable of the config file, which was read before '
                'the command line, so what is made from it keeps its old values; '
                f'{_places(name, cfg)}'
            )


def _misspelt_keys(cfg: Config, overrides: Mapping) -> Iterator[str]:
    """Yield names that the file does not use and that resemble a name that mm reads."""
    known = read_keys()
    given = {key.split('.')[0] for key in overrides}
    words = _uses(cfg)
    for name in cfg.keys():
        if name in known or name in _VARIABLES or name in given or words.count(name) > 1:
            continue
        nearest = difflib.get_close_matches(name, known, 1, _ALIKE)
        if nearest:
            yield f'{name}: nothing reads it; did you mean {nearest[0]}?'


def _uses(cfg: Config) -> list[str]:
    """Return the words of a config file and of those it inherits from, without comments."""
    return re.findall(r'\w+', re.sub('#.*', '', cfg.text or ''))


def _places(name: str, cfg: Config) -> str:
    """Say which settings a variable of that name was most likely used in."""
    inside = [path for path in _paths(cfg) if path.split('.')[-1] == name and path != name]
    if not inside:
        return 'set what is made from it, or change it in the file'
    return f'set {" and ".join(inside[:3])} instead, or change it in the file'


def _suggest(name: str, key: str, cfg: Config, known: Collection[str]) -> str:
    if name in _RENAMED:
        return f'it is {_RENAMED[name]} now'
    inside = [path for path in _paths(cfg) if path.split('.')[-1] == name and path != name]
    if inside:
        place = min(inside, key=lambda path: path.count('.'))
        return f'did you mean {place}{key[len(name) :]}?'
    nearest = difflib.get_close_matches(name, [*known, *cfg.keys()], 2, 0.6)
    nearest = [candidate for candidate in nearest if candidate != name]
    if nearest:
        return f'did you mean {nearest[0]}{key[len(name) :]}?'
    return f'mm reads {", ".join(sorted(known))}'


def _paths(cfg: Config) -> Iterator[str]:
    """Return the dotted names of all settings in a config that mm reads."""
    known = read_keys()
    for name, value in settings_of(cfg).items():
        if name in known:
            yield name
            yield from _inner_paths(value, name)


def _inner_paths(node: Any, path: str, depth: int = 5) -> Iterator[str]:
    items: Iterable = ()
    if depth and isinstance(node, Mapping):
        items = node.items()
    elif depth and isinstance(node, (list, tuple)):
        items = enumerate(node)
    for key, value in items:
        yield f'{path}.{key}'
        yield from _inner_paths(value, f'{path}.{key}', depth - 1)


# Options of what is built


def accepted(factory: Any) -> set[str] | None:
    """Return the names of the arguments that a class or function takes.

    Those of its bases are included as far as keywords are passed on. None if they are not known.
    """
    if not inspect.isclass(factory):
        parameters = inspect.signature(factory).parameters.values()
        catches = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return None if catches else {p.name for p in parameters}
    names: set[str] = set()
    passes = False
    for base in factory.__mro__:
        init = base.__dict__.get('__init__')
        if base is object or init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        # mmengine's hook keeps unknown options and fails only when it saves
        passes = base is not CheckpointHook and any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not passes:
            break
    return None if passes else names - {'self'}


def _unknown_options(cfg: Config) -> Iterator[str]:
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping) and 'type' not in hook and name not in DEFAULT_HOOKS:
            nearest = difflib.get_close_matches(name, DEFAULT_HOOKS, 1)
            remedy = f'did you mean default_hooks.{nearest[0]}?' if nearest else 'give it one'
            yield f'default_hooks.{name} has no type; {remedy}'
    for path, options, registry, also in settings_built(cfg):
        kind = options.get('type')
        factory = find_type(registry, kind, cfg) if isinstance(kind, str) else kind
        names = accepted(factory) if callable(factory) else None
        if names is not None:
            yield from _compare(path, options, names | set(also) | {'type', '_scope_'}, factory)
            yield from _wrong_types(path, options, factory)
    for path, names in (
        ('randomness', set(inspect.signature(Runner.set_randomness).parameters) - {'self'}),
        ('env_cfg', set(_ENV_OPTIONS)),
        ('auto_scale_lr', {'enable', 'base_batch_size'}),
        *((f'{task}_dataloader', _DATALOADER_OPTIONS) for task in TASKS),
    ):
        if isinstance(cfg.get(path), Mapping):
            yield from _compare(path, cfg[path], names)


def _compare(
    path: str, options: Mapping, names: Collection[str], factory: Any = None
) -> Iterator[str]:
    for option in options:
        if option not in names:
            nearest = difflib.get_close_matches(str(option), names, 1, 0.6)
            remedy = (
                f'did you mean {path}.{nearest[0]}?'
                if nearest
                else f'it takes {", ".join(sorted(names - {"type", "_scope_"}))}'
            )
            owner = getattr(factory, '__name__', path.split('.')[-1])
            yield f'{path}.{option}: {owner} has no such option; {remedy}'


def _wrong_types(path: str, options: Mapping, factory: Any) -> Iterator[str]:
    """Yield strings where numbers belong, such as ``interval=16k`` on a command line."""
    for option, value in options.items():
        hint = _annotation(factory, option)
        if hint in (int, float, bool) and isinstance(value, str):
            yield f'{path}.{option}={value!r}: it must be a number of type {hint.__name__}'
        if option in ('interval', 'max_iters', 'max_epochs', 'val_interval'):
            if hint is int and isinstance(value, (int, float)) and _is_no_period(option, value):
                yield f'{path}.{option}={value!r}: it must be a positive whole number'


def _is_no_period(option: str, value: float) -> bool:
    # mm's hooks take -1 to mean never
    return value != int(value) or (value < 1 and not (option == 'interval' and value == -1))


def _annotation(factory: Any, option: str) -> Any:
    for base in factory.__mro__ if inspect.isclass(factory) else (factory,):
        init = base.__dict__.get('__init__') if inspect.isclass(base) else base
        if init is not None and option in inspect.signature(init).parameters:
            try:
                return typing.get_type_hints(init).get(option)
            except (NameError, TypeError):  # annotations that only a type checker can resolve
                return None
    return None
