"""Check that heads fit the data's classes, and that layers fit their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from ...nn import ARCHS
from ...weights.downloads import PUBLISHED_SCHEME
from .findings import Finding
from .walk import TASKS, ConfigError, datasets_of, find_type, parts

_OTHER_HEADS = ('STDCHead',)  # predicts edges

# Classes


def class_problems(cfg: Config) -> Iterator[str]:
    """Compare the number of classes of every loader's data with that of every head."""
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
    """Return the metainfo of a data set (``classes``), as far as known before it is built.

    Raises:
        ConfigError: If ``metainfo`` or ``classes`` is invalid, such as a single string, whose
            letters would become the classes.
    """
    kind = dataset.get('type')
    factory = find_type(DATASETS, kind, cfg) if isinstance(kind, str) else kind
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
    """Yield the place and value of each ``num_classes`` that must equal the data's."""
    model = cfg.get('model')
    # trackers are trained on one data set and tested on another
    if isinstance(model, Mapping) and 'tracker' not in model:
        for path, settings in parts(model, 'model'):
            value = _num_classes(cfg, settings)
            if isinstance(value, int):
                yield f'{path}.num_classes', value


def _num_classes(cfg: Config, settings: Mapping) -> int | None:
    """Return num_classes, or the head's default; None for a part without either."""
    kind = settings.get('type')
    if kind in _OTHER_HEADS:
        return None
    if 'num_classes' in settings:
        return settings['num_classes']
    if not str(getattr(kind, '__name__', kind)).endswith('Head'):
        return None
    factory = find_type(MODELS, kind, cfg) if isinstance(kind, str) else kind
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


# Channels

# Necks that take one map for each entry of `in_channels` and return maps of one width.
_PYRAMIDS = ('FPN', 'PAFPN', 'ChannelMapper', 'NASFPN', 'FPN_CARAFE')
_HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head', 'rpn_head', 'bbox_head')


def channel_problems(cfg: Config) -> Iterator[str]:
    """Compare ``in_channels`` of necks and heads with what a backbone of this package returns."""
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    widths = _widths(cfg, backbone) if isinstance(backbone, Mapping) else None
    if widths is None:
        return
    source = f'the backbone ({backbone.get("arch", backbone["type"])!s:.40}) returns {widths}'
    neck = model.get('neck')
    if isinstance(neck, Mapping):
        yield from _neck_problems(neck, widths, source)
        if neck.get('type') not in _PYRAMIDS or not isinstance(neck.get('out_channels'), int):
            return
        count = neck.get('num_outs', len(widths))
        widths = [neck['out_channels']] * (count if isinstance(count, int) else len(widths))
        source = f'model.neck.out_channels={neck["out_channels"]}'
    elif neck is not None:
        return
    for name in _HEADS:
        for path, head in _one_or_more(model.get(name), f'model.{name}'):
            yield from _head_problems(path, head, widths, source)
    yield from _roi_problems(model.get('roi_head'), widths, source)


def start_problems(cfg: Config) -> Iterator[str]:
    """Check that the published weights that a training starts from have its backbone's arch."""
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping) or cfg.get('load_from') or cfg.get('resume'):
        return
    arch, init_cfg = backbone.get('arch'), backbone.get('init_cfg')
    source = init_cfg.get('checkpoint') if isinstance(init_cfg, Mapping) else None
    if not isinstance(arch, str) or not isinstance(source, str) or arch not in ARCHS:
        return
    held = source.removeprefix(PUBLISHED_SCHEME).removesuffix('_bn')
    if source.startswith(PUBLISHED_SCHEME) and held in ARCHS and held != arch:
        path = 'model.backbone.init_cfg.checkpoint'
        yield (
            f'{path}={source}, but the backbone is {arch}: set {path}={source.replace(held, arch)}'
        )


def _widths(cfg: Config, settings: Mapping) -> list[int] | None:
    """Return the channels of a backbone's outputs; None if it is not ours, or cannot be built."""
    from ...backbones import MetaFormer, PolyNeXt

    factory = settings.get('type')
    factory = find_type(MODELS, factory, cfg) if isinstance(factory, str) else factory
    if not (isinstance(factory, type) and issubclass(factory, (MetaFormer, PolyNeXt))):
        return None
    left_out = ('type', 'init_cfg', 'compile_cells', '_scope_')
    options = {key: value for key, value in settings.items() if key not in left_out}
    try:
        with torch.device('meta'):
            return list(factory(**options).out_channels)
    except (ImportError, TypeError, ValueError):  # building the model reports it
        return None


def input_channels(cfg: Config) -> int | None:
    """Return how many channels a backbone of this package takes; None for other backbones."""
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping) or backbone.get('type') not in ('PolyNeXt', 'MetaFormer'):
        return None
    return backbone.get('in_channels', 3)


def channel_fault(channels: int, wanted: int, model: Mapping) -> Finding | None:
    """Return what is wrong with the number of channels of images as the pipeline returns them.

    Args:
        channels: How many an image has.
        wanted: How many the backbone takes.
        model: Settings of the model.
    """
    mean = (model.get('data_preprocessor') or {}).get('mean')
    means = len(mean) if isinstance(mean, (list, tuple)) else 1
    if means not in (1, channels) and channels != 1:
        return Finding(
            f'have {channels} channels, and model.data_preprocessor.mean has {means} numbers',
            'write one number for each channel in mean and std, or one for all',
        )
    channels = max(channels, means)  # a gray image is broadcast to the channels of mean
    if channels != wanted:
        return Finding(
            f'have {channels} channels, and the backbone takes {wanted}',
            f'set model.backbone.in_channels={channels} (docs/own_data.md)',
        )
    return None


def _one_or_more(value: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(value, Mapping):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            if isinstance(part, Mapping):
                yield f'{path}.{index}', part


def _neck_problems(neck: Mapping, widths: list[int], source: str) -> Iterator[str]:
    given = neck.get('in_channels')
    if isinstance(given, int):
        if given not in widths:
            yield f'model.neck.in_channels={given}, but {source}: set it to the one that is meant'
    elif isinstance(given, (list, tuple)) and list(given) != widths:
        if len(given) == len(widths) or neck.get('type') in _PYRAMIDS:
            yield _to_set('model.neck.in_channels', given, source, widths)


def _to_set(path: str, given: Any, source: str, right: Any) -> str:
    given = list(given) if isinstance(given, tuple) else given
    return f'{path}={given}, but {source}: set {path}={right}'


def _head_problems(path: str, head: Mapping, widths: list[int], source: str) -> Iterator[str]:
    given, index = head.get('in_channels'), head.get('in_index')
    segments = path.startswith(('model.decode_head', 'model.auxiliary_head'))
    if isinstance(given, int) and segments:
        index = -1 if index is None else index
        if isinstance(index, int) and -len(widths) <= index < len(widths):
            if given != widths[index]:
                yield _to_set(f'{path}.in_channels', given, source, widths[index])
        elif isinstance(index, int):
            yield f'{path}.in_index={index}, but {source}: {len(widths)} outputs, from 0'
    elif isinstance(given, int):
        if given not in widths:
            right = widths[0] if len(set(widths)) == 1 else widths
            yield _to_set(f'{path}.in_channels', given, source, right)
    elif isinstance(given, (list, tuple)):
        if isinstance(index, (list, tuple)) and all(isinstance(i, int) for i in index):
            if any(not -len(widths) <= i < len(widths) for i in index):
                yield f'{path}.in_index={list(index)}, but {source}: {len(widths)} outputs, from 0'
                return
            right = [widths[i] for i in index]
        else:
            right = widths
        if list(given) != right:
            yield _to_set(f'{path}.in_channels', given, source, right)


def _roi_problems(roi_head: Any, widths: list[int], source: str) -> Iterator[str]:
    if not isinstance(roi_head, Mapping) or len(set(widths)) != 1:
        return
    for extractor, name in (
        ('bbox_roi_extractor', 'bbox_head'),
        ('mask_roi_extractor', 'mask_head'),
    ):
        place = f'model.roi_head.{extractor}'
        for path, settings in _one_or_more(roi_head.get(extractor), place):
            given = settings.get('out_channels')
            if settings.get('type') != 'SingleRoIExtractor' or not isinstance(given, int):
                return
            if given != widths[0]:
                yield _to_set(f'{path}.out_channels', given, source, widths[0])
        for path, head in _one_or_more(roi_head.get(name), f'model.roi_head.{name}'):
            given = head.get('in_channels')
            if isinstance(given, int) and given != widths[0]:
                yield _to_set(f'{path}.in_channels', given, source, widths[0])


# Class weights and colours

_MORE_CLASSES = ('SideAdapterCLIPHead',)  # heads whose losses have a weight for the background


def weight_problems(cfg: Config) -> Iterator[str]:
    """Find losses whose number of class weights differs from the number of classes."""
    model = cfg.get('model')
    for path, head in parts(model, 'model') if isinstance(model, Mapping) else ():
        classes = _num_classes(cfg, head)
        if not isinstance(classes, int):
            things = (head.get('num_things_classes'), head.get('num_stuff_classes'))
            classes = sum(things) if all(isinstance(n, int) for n in things) else None
        if classes is None or head.get('type') in _MORE_CLASSES:
            continue
        for place, loss in _one_or_more(head.get('loss_decode'), f'{path}.loss_decode'):
            outputs = head.get('out_channels') or classes
            # a single logit has a single weight, for the class that it predicts
            yield from _wrong_weights(place, loss, outputs)
        loss = head.get('loss_cls')
        if isinstance(loss, Mapping) and not loss.get('use_sigmoid'):
            yield from _wrong_weights(f'{path}.loss_cls', loss, classes + 1, ' with background')


def _wrong_weights(path: str, loss: Mapping, count: int, more: str = '') -> Iterator[str]:
    weights = loss.get('class_weight')
    if isinstance(weights, (list, tuple)) and len(weights) != count:
        there = 'is 1 output' if count == 1 else f'are {count} classes{more}'
        yield (
            f'{path}.class_weight has {len(weights)} weights, and there {there}: write one weight '
            'for each'
        )


def palette_problems(cfg: Config) -> Iterator[str]:
    """Find palettes in ``metainfo`` with too many or too few colours."""
    for task in TASKS:
        loader = cfg.get(f'{task}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        for place, settings in datasets_of(dataset, f'{task}_dataloader.dataset'):
            metainfo = settings.get('metainfo')
            palette = metainfo.get('palette') if isinstance(metainfo, Mapping) else None
            classes = metainfo_of(cfg, settings).get('classes')
            if not isinstance(palette, (list, tuple)) or not palette or not classes:
                continue
            kind = settings.get('type')
            factory = find_type(DATASETS, kind, cfg) if isinstance(kind, str) else kind
            known = len(getattr(factory, 'METAINFO', {}).get('classes') or ())
            # mmseg picks the colours of the chosen classes; mmdet ignores surplus colours
            allowed = {len(classes), known} if hasattr(factory, 'get_label_map') else None
            if len(palette) < len(classes) or (allowed and len(palette) not in allowed):
                yield (
                    f'{place}.metainfo.palette has {len(palette)} colours, and there are '
                    f'{len(classes)} classes ({_shortened(classes)}): write one for each, or leave '
                    'palette out'
                )
