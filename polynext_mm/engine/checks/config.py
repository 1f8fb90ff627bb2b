"""Checks of a config before anything is built from it.

They find settings that name nothing, options that what they are given to does not have, and heads
whose number of classes is not that of the data.

Nothing is built and no data is read, so the checks take a second, and they hold for any config of
mmseg's or mmdet's. What is not understood for certain (a class that takes any keyword, a data set
whose classes are not known) passes.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    Registry,
)
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...compat.mmengine import settings_of

TASKS = ('train', 'val', 'test')
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
# Written for older releases and read by nobody since.
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
# Variables that configs often have and mm does not read, however near their names are to what it
# reads.
_VARIABLES = tuple(f'{task}_pipeline' for task in TASKS)
# tools/ carries it to the data loaders and evaluators themselves
_CARRIED_OVER = ('data_root',)
_ALIKE = (
    0.88  # of difflib: 'load_form' and 'load_from' are, 'tta_pipeline' and 'val_pipeline' are not
)
_DEFAULT_HOOKS = dict(
    runtime_info='RuntimeInfoHook',
    timer='IterTimerHook',
    sampler_seed='DistSamplerSeedHook',
    logger='LoggerHook',
    param_scheduler='ParamSchedulerHook',
    checkpoint='CheckpointHook',
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
# Constructors that pass what they are given besides `optimizer` to the wrapper.
_PLAIN_CONSTRUCTORS = (
    None,
    'DefaultOptimWrapperConstructor',
    'LearningRateDecayOptimizerConstructor',
    'PolyNeXtOptimWrapperConstructor',
)


class ConfigError(ValueError):
    """A config that asks for something that does not exist. One line for each such setting."""


def read_keys() -> set[str]:
    """Names of the top-level settings that mm reads."""
    arguments = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    return arguments | set(_READ_BY_TOOLS)


def check_config(
    cfg: Config, file_keys: Collection[str] | None = None, overrides: Mapping | None = None
) -> None:
    """Check all that can be told from a config alone.

    Args:
        cfg: As it will be run.
        file_keys: Top-level names of the config file, without what the command line adds. Defaults
            to those of ``cfg``.
        overrides: Settings of the command line, keys with dots.

    Raises:
        ConfigError: If a setting names nothing, or an option or number of classes cannot be right.
    """
    # what follows looks into them
    problems = list(_wrong_kinds(cfg)) or [
        *_unknown_overrides(cfg, cfg.keys() if file_keys is None else file_keys, overrides or {}),
        *_misspelt_keys(cfg, overrides or {}),
        *_unknown_options(cfg),
        *_impossible_numbers(cfg),
        *_contradictions(cfg),
        *class_problems(cfg),
    ]
    if problems:
        raise ConfigError(
            '\n  '.join(
                [f'{len(problems)} of the settings cannot be as they are meant:', *problems]
            )
        )


# Kinds of values


def _wrong_kinds(cfg: Config) -> Iterator[str]:
    """Numbers, words and lists where there must be settings, and settings where there must be a
    list. Objects that are built already pass."""
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
        for path, evaluator, *_ in _each(f'{task}_evaluator', evaluators, METRICS):
            metrics = evaluator.get('iou_metrics', ())
            if isinstance(metrics, str) or not _words(metrics):
                yield f'{path}.iou_metrics={metrics!r}: it must be a list of names'


def _list(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else ()


def _words(value: Any) -> bool:
    """Whether it is a word or a list of words."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)
    )


def _impossible_numbers(cfg: Config) -> Iterator[str]:
    """Numbers with which loading, drawing or the optimizer fail once the data has been read."""
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
    """Of an optimizer, or of one of several."""
    if not isinstance(settings, Mapping):
        return
    rate = settings.get('lr')
    numeric = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if isinstance(rate, (str, bool, list, tuple, Mapping)) or (
        numeric and not 0 <= rate < math.inf  # nan is not, either
    ):
        yield f'{path}.lr={rate!r}: it must be a number, 0 or more'
    for name, inner in settings.items():
        if name != 'paramwise_cfg':
            yield from _impossible_rates(f'{path}.{name}', inner)


# Names of settings


def _unknown_overrides(
    cfg: Config, file_keys: Collection[str], overrides: Mapping
) -> Iterator[str]:
    """Of the command line: what neither the file has nor mm reads."""
    known = read_keys()
    for key, value in overrides.items():
        name = key.split('.')[0]
        if name in known or name in _CARRIED_OVER:
            continue
        if name not in file_keys:
            yield f'{key}={value}: nothing reads {name}; {_suggest(name, key, cfg, known)}'
        elif name not in _RENAMED:
            print_log(
                f'{key}={value}: {name} is a variable of the config file, which was read before '
                'the command line: settings made from it keep their old values. Set those '
                'themselves',
                logger='current',
                level=logging.WARNING,
            )


def _misspelt_keys(cfg: Config, overrides: Mapping) -> Iterator[str]:
    """Of the config file: what mm does not read, but nearly, and the file does not use either."""
    known = read_keys()
    given = {key.split('.')[0] for key in overrides}
    words = re.findall(r'\w+', cfg.text or '')
    for name in cfg.keys():
        if name in known or name in _VARIABLES or name in given or words.count(name) > 1:
            continue
        nearest = difflib.get_close_matches(name, known, 1, _ALIKE)
        if nearest:
            yield f'{name}: nothing reads it; did you mean {nearest[0]}?'


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


def _paths(node: Any, path: str = '', depth: int = 4) -> Iterator[str]:
    """Names of settings inside others, with dots; those inside lists are left out."""
    if depth and isinstance(node, Mapping):
        for key, value in node.items():
            inner = f'{path}.{key}' if path else str(key)
            yield inner
            yield from _paths(value, inner, depth - 1)
    elif depth and isinstance(node, Config):
        yield from _paths(settings_of(node), path, depth)


# Options of what is built


def accepted(factory: Any) -> set[str] | None:
    """Return the names of the arguments that a class or function takes.

    Those of its bases count too, as long as keywords are passed on. None where that cannot be told.
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
        # mmengine's own keeps unknown options for the moment of saving, and fails then
        passes = base is not CheckpointHook and any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not passes:
            break
    return None if passes else names - {'self'}


def _unknown_options(cfg: Config) -> Iterator[str]:
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping) and 'type' not in hook and name not in _DEFAULT_HOOKS:
            nearest = difflib.get_close_matches(name, _DEFAULT_HOOKS, 1)
            remedy = f'did you mean default_hooks.{nearest[0]}?' if nearest else 'give it one'
            yield f'default_hooks.{name} has no type; {remedy}'
    for path, options, registry, also in _built(cfg):
        kind = options.get('type')
        factory = _find(registry, kind, cfg) if isinstance(kind, str) else kind
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
    """Words where numbers belong: ``interval=16k`` of a command line is a string."""
    for option, value in options.items():
        hint = _annotation(factory, option)
        if hint in (int, float, bool) and isinstance(value, str):
            yield f'{path}.{option}={value!r}: it must be a number of type {hint.__name__}'
        if option in ('interval', 'max_iters', 'max_epochs', 'val_interval'):
            if hint is int and isinstance(value, (int, float)) and _is_no_period(option, value):
                yield f'{path}.{option}={value!r}: it must be a positive whole number'


def _is_no_period(option: str, value: float) -> bool:
    # -1 is mm's word for never, of hooks
    return value != int(value) or (value < 1 and not (option == 'interval' and value == -1))


def _annotation(factory: Any, option: str) -> Any:
    for base in factory.__mro__ if inspect.isclass(factory) else (factory,):
        init = base.__dict__.get('__init__') if inspect.isclass(base) else base
        if init is not None and option in inspect.signature(init).parameters:
            try:
                return typing.get_type_hints(init).get(option)
            except (NameError, TypeError):  # annotations that only a type checker resolves
                return None
    return None


def _built(cfg: Config) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    """Yield what mm will build.

    Yields:
        Its place in the config, its settings, the registry of its type, and the options that are
        taken out before it is built.
    """
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping):
            hook = {'type': _DEFAULT_HOOKS.get(name), **hook}
            yield f'default_hooks.{name}', hook, HOOKS, ('priority',)
    yield from _each('custom_hooks', cfg.get('custom_hooks'), HOOKS, ('priority',))
    for task in TASKS:
        loop = cfg.get(f'{task}_cfg')
        if isinstance(loop, Mapping):
            yield f'{task}_cfg', {**loop, 'type': _loop_type(task, loop)}, LOOPS, ('by_epoch',)
        loader = cfg.get(f'{task}_dataloader')
        if isinstance(loader, Mapping):
            yield from _each(f'{task}_dataloader.sampler', loader.get('sampler'), DATA_SAMPLERS)
            yield from _each(
                f'{task}_dataloader.batch_sampler', loader.get('batch_sampler'), DATA_SAMPLERS
            )
            yield from (
                (path, dataset, DATASETS, ('lazy_init',))
                for path, dataset in datasets_of(
                    loader.get('dataset'), f'{task}_dataloader.dataset', wrappers=True
                )
            )
        # mm's own tools set keep_results
        yield from _each(
            f'{task}_evaluator', cfg.get(f'{task}_evaluator'), METRICS, ('keep_results',)
        )
    yield from _schedulers(cfg.get('param_scheduler'))
    yield from _each('log_processor', cfg.get('log_processor'), LOG_PROCESSORS)
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, Mapping) and wrapper.get('constructor') in _PLAIN_CONSTRUCTORS:
        also = ('optimizer', 'constructor', 'paramwise_cfg')
        yield 'optim_wrapper', {'type': 'OptimWrapper', **wrapper}, OPTIM_WRAPPERS, also
        yield from _each('optim_wrapper.optimizer', wrapper.get('optimizer'), OPTIMIZERS)


def _each(
    path: str, settings: Any, registry: Registry, also: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    if isinstance(settings, Mapping):
        yield path, settings, registry, also
    elif isinstance(settings, (list, tuple)):
        for index, item in enumerate(settings):
            if isinstance(item, Mapping):
                yield f'{path}.{index}', item, registry, also


def _schedulers(settings: Any) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    also = ('convert_to_iter_based',)
    if isinstance(settings, Mapping) and 'type' not in settings:  # one list for each optimizer
        for name, inner in settings.items():
            yield from _each(f'param_scheduler.{name}', inner, PARAM_SCHEDULERS, also)
    else:
        yield from _each('param_scheduler', settings, PARAM_SCHEDULERS, also)


def _loop_type(task: str, loop: Mapping) -> Any:
    if 'type' in loop:
        return loop['type']
    if task == 'train':
        return 'EpochBasedTrainLoop' if loop.get('by_epoch', True) else 'IterBasedTrainLoop'
    return {'val': 'ValLoop', 'test': 'TestLoop'}[task]


def _find(registry: Registry, kind: str, cfg: Config) -> Any:
    """Return a class by its name in a config's scope; None if there is none: mm reports it best."""
    with registry.switch_scope_and_registry(cfg.get('default_scope') or 'mmengine') as scoped:
        return scoped.get(kind)


def datasets_of(dataset: Any, path: str, wrappers: bool = False) -> Iterator[tuple[str, Mapping]]:
    """Settings of the data sets of a loader, inside whatever wraps them, and their places.

    Args:
        dataset: The ``dataset`` of a data loader.
        path: Its place in the config.
        wrappers: Give the wrappers as well.
    """
    if not isinstance(dataset, Mapping):
        return
    inner = [(f'{path}.dataset', dataset['dataset'])] if 'dataset' in dataset else []
    if isinstance(dataset.get('datasets'), Sequence):
        inner += [(f'{path}.datasets.{i}', part) for i, part in enumerate(dataset['datasets'])]
    if not inner or wrappers:
        yield path, dataset
    for place, part in inner:
        yield from datasets_of(part, place, wrappers)


# Settings that contradict each other


def _contradictions(cfg: Config) -> Iterator[str]:
    loop = cfg.get('train_cfg')
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if not isinstance(loop, Mapping) or not isinstance(hook, Mapping):
        return
    interval = hook.get('interval')
    if isinstance(interval, (int, float)) and interval > 1 and hook.get('by_epoch', True):
        if _loop_type('train', loop) == 'IterBasedTrainLoop':
            yield (
                f'default_hooks.checkpoint.interval={interval} counts epochs, of which '
                'training by iterations has one: nothing would be saved before its end; set '
                'default_hooks.checkpoint.by_epoch=False'
            )
    yield from _unknown_metrics(cfg, hook.get('save_best'))


def _unknown_metrics(cfg: Config, save_best: Any) -> Iterator[str]:
    """``save_best`` is looked up after the first validation, which may be hours away."""
    names = metric_names(cfg.get('val_evaluator'))
    wanted = [save_best] if isinstance(save_best, str) else save_best or ()
    for name in wanted:
        if names and name != 'auto' and name not in names:
            nearest = difflib.get_close_matches(name, names, 1, 0.5)
            remedy = f'did you mean {nearest[0]}?' if nearest else f'there are {", ".join(names)}'
            yield f'default_hooks.checkpoint.save_best={name}: no such metric; {remedy}'


def metric_names(evaluators: Any) -> list[str] | None:
    """Names under which IoUMetric and CocoMetric report; None with other metrics among them."""
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


# Classes


def class_problems(cfg: Config) -> Iterator[str]:
    """Compare the number of classes of the data of every loader with that of every head."""
    yield from _wrong_rpn(cfg)
    heads = list(heads_of(cfg))
    told = set()
    for task in TASKS:
        loader = cfg.get(f'{task}_dataloader')
        loader = loader if isinstance(loader, Mapping) else {}
        for place, dataset in datasets_of(loader.get('dataset'), f'{task}_dataloader.dataset'):
            metainfo = metainfo_of(cfg, dataset)
            classes = metainfo.get('classes')
            if classes is None or dataset.get('return_classes'):
                continue
            right = {len(classes), len(metainfo.get('thing_classes') or classes)}
            for path, value in heads:
                if value not in right and (path, len(classes)) not in told:
                    told.add((path, len(classes)))
                    yield (
                        f'{path}={value}, but {place} ({dataset.get("type")}) has {len(classes)} '
                        f'classes ({_shortened(classes)}): set {path}={len(classes)}, or metainfo '
                        'of the data set to the classes that are meant'
                    )


def metainfo_of(cfg: Config, dataset: Mapping) -> dict[str, Any]:
    """What a data set will say of itself (``classes``), as far as that is known before it is built.

    Raises:
        ConfigError: If ``metainfo`` or ``classes`` is no such thing: one word, whose letters would
            be the classes.
    """
    kind = dataset.get('type')
    factory = _find(DATASETS, kind, cfg) if isinstance(kind, str) else kind
    load = getattr(factory, '_load_metainfo', None)
    if load is None:
        return {}
    metainfo = dataset.get('metainfo')
    if isinstance(metainfo, (str, int, float, list, tuple)):
        raise ConfigError(f"metainfo={metainfo!r}: write a dict, metainfo=dict(classes=('a', 'b'))")
    loaded = load(dict(metainfo) if isinstance(metainfo, Mapping) else metainfo)
    classes = loaded.get('classes')
    if isinstance(classes, str):
        raise ConfigError(
            f"metainfo.classes={classes!r} is one word, not a list of names: write ('{classes}',)"
        )
    if classes is not None and not isinstance(classes, Sequence):
        raise ConfigError(f'metainfo.classes={classes!r} is no list of names')
    return loaded


def heads_of(cfg: Config) -> Iterator[tuple[str, int]]:
    """Return ``num_classes`` of what has one class for each of the data's, by its place."""
    model = cfg.get('model')
    # trackers are trained on one data set and tested on another
    if isinstance(model, Mapping) and 'tracker' not in model:
        for path, settings in _parts(model, 'model'):
            value = _num_classes(cfg, settings)
            if isinstance(value, int):
                yield f'{path}.num_classes', value


# Parts of models whose classes are not those of the data: image classifiers, objects against
# background, the stuff around objects, what identifies persons, words of a text.
_OTHER_CLASSES = (
    'backbone',
    'data_preprocessor',
    'language_model',
    'reid',
    'rpn_head',
    'semantic_head',
    'teacher',
)
_OTHER_HEADS = ('STDCHead',)  # of edges


def _parts(node: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        if 'type' in node:
            yield path, node
        for key, value in node.items():
            if key not in _OTHER_CLASSES:
                yield from _parts(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _parts(value, f'{path}.{index}')


def _num_classes(cfg: Config, settings: Mapping) -> int | None:
    """Of a part: as set, or, of a head, by default."""
    kind = settings.get('type')
    if kind in _OTHER_HEADS:
        return None
    if 'num_classes' in settings:
        return settings['num_classes']
    if not str(getattr(kind, '__name__', kind)).endswith('Head'):
        return None
    factory = _find(MODELS, kind, cfg) if isinstance(kind, str) else kind
    for base in getattr(factory, '__mro__', ()):
        init = base.__dict__.get('__init__')
        parameter = init and inspect.signature(init).parameters.get('num_classes')
        if parameter:
            return parameter.default if isinstance(parameter.default, int) else None
    return None


def _wrong_rpn(cfg: Config) -> Iterator[str]:
    model = cfg.get('model')
    head = model.get('rpn_head') if isinstance(model, Mapping) else None
    if isinstance(head, Mapping) and str(head.get('type')).endswith('RPNHead'):
        value = head.get('num_classes', 1)
        if value != 1:
            yield (
                f'model.rpn_head.num_classes={value}: it tells objects from background, which is 1 '
                'class whatever the data: leave it out'
            )


def _shortened(names: Sequence[str]) -> str:
    return ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')
