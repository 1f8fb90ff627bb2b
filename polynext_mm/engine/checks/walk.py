"""What mm will build from a config, found without building it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    Registry,
)

from ...compat.logs import without_noise

TASKS = ('train', 'val', 'test')
DEFAULT_HOOKS = dict(
    runtime_info='RuntimeInfoHook',
    timer='IterTimerHook',
    sampler_seed='DistSamplerSeedHook',
    logger='LoggerHook',
    param_scheduler='ParamSchedulerHook',
    checkpoint='CheckpointHook',
)
# Constructors that pass all settings but `optimizer` on to the wrapper.
_PLAIN_CONSTRUCTORS = (
    None,
    'DefaultOptimWrapperConstructor',
    'LearningRateDecayOptimizerConstructor',
    'PolyNeXtOptimWrapperConstructor',
)


class ConfigError(ValueError):
    """A config with invalid settings, one line for each."""


def settings_built(cfg: Config) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    """Yield what mm will build.

    Yields:
        The place in the config, the settings, the registry of the type, and the options that are
        removed before it is built.
    """
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping):
            hook = {'type': DEFAULT_HOOKS.get(name), **hook}
            yield f'default_hooks.{name}', hook, HOOKS, ('priority',)
    yield from each('custom_hooks', cfg.get('custom_hooks'), HOOKS, ('priority',))
    for task in TASKS:
        loop = cfg.get(f'{task}_cfg')
        if isinstance(loop, Mapping):
            yield f'{task}_cfg', {**loop, 'type': loop_type(task, loop)}, LOOPS, ('by_epoch',)
        loader = cfg.get(f'{task}_dataloader')
        if isinstance(loader, Mapping):
            yield from each(f'{task}_dataloader.sampler', loader.get('sampler'), DATA_SAMPLERS)
            yield from each(
                f'{task}_dataloader.batch_sampler', loader.get('batch_sampler'), DATA_SAMPLERS
            )
            yield from (
                (path, dataset, DATASETS, ('lazy_init',))
                for path, dataset in datasets_of(
                    loader.get('dataset'), f'{task}_dataloader.dataset', wrappers=True
                )
            )
        # mm's own tools set keep_results
        yield from each(
            f'{task}_evaluator', cfg.get(f'{task}_evaluator'), METRICS, ('keep_results',)
        )
    yield from schedulers(cfg.get('param_scheduler'))
    yield from each('log_processor', cfg.get('log_processor'), LOG_PROCESSORS)
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, Mapping) and wrapper.get('constructor') in _PLAIN_CONSTRUCTORS:
        also = ('optimizer', 'constructor', 'paramwise_cfg')
        yield 'optim_wrapper', {'type': 'OptimWrapper', **wrapper}, OPTIM_WRAPPERS, also
        yield from each('optim_wrapper.optimizer', wrapper.get('optimizer'), OPTIMIZERS)


def each(
    path: str, settings: Any, registry: Registry, also: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    if isinstance(settings, Mapping):
        yield path, settings, registry, also
    elif isinstance(settings, (list, tuple)):
        for index, item in enumerate(settings):
            if isinstance(item, Mapping):
                yield f'{path}.{index}', item, registry, also


def schedulers(settings: Any) -> Iterator[tuple[str, Mapping, Registry, tuple[str, ...]]]:
    also = ('convert_to_iter_based',)
    if isinstance(settings, Mapping) and 'type' not in settings:  # one list for each optimizer
        for name, inner in settings.items():
            yield from each(f'param_scheduler.{name}', inner, PARAM_SCHEDULERS, also)
    else:
        yield from each('param_scheduler', settings, PARAM_SCHEDULERS, also)


def loop_type(task: str, loop: Mapping) -> Any:
    if 'type' in loop:
        return loop['type']
    if task == 'train':
        return 'EpochBasedTrainLoop' if loop.get('by_epoch', True) else 'IterBasedTrainLoop'
    return {'val': 'ValLoop', 'test': 'TestLoop'}[task]


def find_type(registry: Registry, kind: str, cfg: Config) -> Any:
    """Return a class by its name in a config's scope; None if unknown: mm reports that itself."""
    scope = cfg.get('default_scope') or 'mmengine'
    with without_noise(), registry.switch_scope_and_registry(scope) as scoped:
        return scoped.get(kind)


def datasets_of(dataset: Any, path: str, wrappers: bool = False) -> Iterator[tuple[str, Mapping]]:
    """Yield the settings of the data sets of a loader, unwrapped, and their places.

    Args:
        dataset: The ``dataset`` of a data loader.
        path: Its place in the config.
        wrappers: Whether to yield the wrappers too.
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


# Parts of models whose classes are not the data's: image classifiers, objects against background,
# stuff, person identities, words of a text.
_OTHER_CLASSES = (
    'backbone',
    'data_preprocessor',
    'language_model',
    'reid',
    'rpn_head',
    'semantic_head',
    'teacher',
)


def parts(node: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        if 'type' in node:
            yield path, node
        for key, value in node.items():
            if key not in _OTHER_CLASSES:
                yield from parts(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from parts(value, f'{path}.{index}')
