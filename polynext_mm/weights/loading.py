"""Load weights strictly: every key is accounted for, or an error names what does not fit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..nn import ARCHS, PolyNeXt
from .errors import CheckpointError, shown
from .names import (
    BACKBONE,
    DROPOUT_RATE,
    infer_arch,
    is_authors,
    norm_of,
    norm_size,
    renamed,
    split_backbone,
    translate,
    unwrapped,
)
from .reading import read
from .tensor_checks import Source, named, require_loadable, require_tensors, require_whole_norms

_STEM = 'stem.weight'


def load(model: nn.Module, source: str | os.PathLike) -> str:
    """Load a checkpoint into a backbone, a classifier or a whole segmentor.

    Args:
        model: A ``PolyNeXt``, a ``PolyNeXtClassifier``, or a model with one as ``backbone``.
        source: Path, url or published name, as for :func:`polynext_mm.weights.read`.

    Returns:
        The report, "loaded N of M tensors ...".

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read or does not fit; the model is unchanged then.
    """
    weights = dict(read(source)['state_dict'])
    if hasattr(model, 'backbone'):
        adapt(cast(PolyNeXt, model.backbone), weights, BACKBONE, source)
        report = check(model, weights, source)
    else:
        report = adapt(cast(PolyNeXt, model), weights, '', source)
    model.load_state_dict(weights, strict=False)
    return report


#: Key of the options that :func:`set_options` puts into the metadata of weights.
OPTIONS = 'polynext_options'


def set_options(weights: Mapping[str, Tensor], **options: bool) -> None:
    """Set the options with which :func:`check` will check weights read from a file."""
    for entry in getattr(weights, '_metadata', {}).values():
        entry[OPTIONS] = options


def adapt(
    backbone: PolyNeXt,
    state_dict: dict[str, Tensor],
    prefix: str,
    source: Source = None,
    other_channels: bool = False,
) -> str:
    """Replace a PolyNeXt's weights in ``state_dict`` by what it loads, after a strict check.

    Prefixes of DDP and torch.compile are removed from the keys; the authors' names are translated.

    Args:
        backbone: A PolyNeXt, with or without output norms or classifier.
        state_dict: Weights, changed in place; keys that begin with ``prefix`` are the backbone's.
            If ``prefix`` is empty, they may be a whole segmentor's, whose heads are left over.
        prefix: Where the backbone is in the model: '' or a name and a dot.
        source: The file, for messages.
        other_channels: Whether to adapt the stem of a file for images of three channels.

    Returns:
        The report.

    Raises:
        CheckpointError: If a shape is wrong, or anything is missing or left over but output norms
            and, for a backbone without one, the classifier; or if the backbone cannot hold a
            value.
    """
    given, left_over = own_weights(state_dict, prefix, source)
    expected = _expected(backbone, given)
    weights = given
    if is_authors(given):
        with naming(source):
            weights = translate(given, backbone.arch, expected)
    adapted = adapt_stem(weights, expected, _STEM) if other_channels else ''
    optional = [
        key
        for key in weights
        if key not in expected and (key.startswith(('head.', 'out_norms.')) or key == DROPOUT_RATE)
    ]
    left_over += optional
    for key in optional:
        del weights[key]
    missing = [key for key in expected if key not in weights]
    fresh = [key for key in missing if key.startswith('out_norms.')]
    raise_unless_equal(
        expected,
        weights,
        [key for key in missing if key not in fresh],
        source,
        lambda: _hint(given, backbone),
    )
    require_whole_norms(fresh, weights, source)
    require_loadable(expected, weights, source)
    state_dict.update({prefix + key: value for key, value in weights.items()})
    return report('PolyNeXt', len(weights), len(expected), source, fresh, left_over) + adapted


def adapt_stem(weights: dict[str, Tensor], expected: Mapping[str, Tensor], key: str) -> str:
    """Adapt the stem of a file for three channels to the channels of the model, as timm does.

    A single channel gets the sum of the three kernels. Of several, channel i gets the kernel of
    channel i modulo 3, times 3 over their number, which keeps the response to equal channels.

    Args:
        weights: Weights of the file, changed in place.
        expected: Weights of the model.
        key: Key of the stem's kernels, (C, channels of the image, h, w).

    Returns:
        What to add to the report, '' if nothing was adapted.
    """
    stem = weights.get(key)
    channels = expected[key].shape[1]
    if stem is None or stem.ndim != 4 or stem.shape[1] != 3 or channels == 3:
        return ''
    if channels == 1:
        weights[key] = stem.sum(1, keepdim=True)
    else:
        weights[key] = stem[:, torch.arange(channels) % 3] * (3 / channels)
    return f'; {key} adapted from 3 to {channels} channels'


def own_weights(
    state_dict: dict[str, Tensor], prefix: str, source: Source
) -> tuple[dict[str, Tensor], list[str]]:
    """Take a backbone's weights out of ``state_dict``.

    Args:
        state_dict: Weights, changed in place.
        prefix: As for :func:`adapt`.
        source: The file, for messages.

    Returns:
        The weights, their keys without the prefix and those of DDP and torch.compile, and the keys
        of heads that are left over.

    Raises:
        CheckpointError: If one is not a dense tensor, or two have the same name.
    """
    require_tensors(state_dict, source)
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    with naming(source):
        weights = renamed(own, lambda key: unwrapped(key.removeprefix(prefix)))
        inner, heads = split_backbone(weights)
        if prefix or not inner:
            return weights, []
        return inner, list(heads)


@contextlib.contextmanager
def naming(source: Source) -> Iterator[None]:
    """Prefix naming errors with the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f'{named(source)}: {error}') from error


def _expected(backbone: PolyNeXt, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that a PolyNeXt expects, with norms of the size of ``weights``."""
    expected = backbone.state_dict()
    size = norm_size(weights, backbone.arch)
    if size is not None:
        expected |= {
            key: torch.empty(shape, device='meta')
            for key, shape in backbone.position_shapes(size).items()
        }
    return expected


def check(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source: Source = None,
    reset_mismatched_heads: bool = False,
    evaluation: bool = False,
    backbones: Mapping[str, nn.Module] | None = None,
) -> str:
    """Check that ``state_dict`` fits the heads of a model; :func:`adapt` checks its backbone.

    Args:
        model: A segmentor or detector.
        state_dict: Weights. Those of heads that keep their initialization are removed.
        source: The file, for messages.
        reset_mismatched_heads: Whether layers whose shape differs, as with another number of
            classes, keep their initialization. Ignored in evaluation.
        evaluation: Whether to refuse files that may start a training but are not the whole model:
            without heads, or with output norms where the model has none, or vice versa.
        backbones: The backbones in the model, by their names; everything else is a head. By default
            ``backbone``.

    Returns:
        The report.

    Raises:
        CheckpointError: If weights of heads are missing, left over or of another shape, or have
            values that the heads cannot hold.
    """
    require_tensors(state_dict, source)
    if backbones is None:
        backbones = {'backbone': cast(nn.Module, model.backbone)}
    prefixes = tuple(f'{name}.' for name in backbones)
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
    heads = {k: v for k, v in state_dict.items() if not k.startswith(prefixes)}
    what = f'{type(model).__name__} heads'
    if evaluation:
        for name, backbone in backbones.items():
            own = {k.removeprefix(f'{name}.') for k in state_dict if k.startswith(f'{name}.')}
            _raise_if_norms_differ(backbone, own, source)
    elif not heads:
        return report(what, 0, len(expected), source, _groups(expected), [])
    mismatched = [
        key
        for key, value in heads.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if reset_mismatched_heads and not evaluation:
        for key in mismatched:
            del heads[key], state_dict[key]
    missing = [
        key for key in expected if key not in heads and not key.endswith('num_batches_tracked')
    ]
    reset = [key for key in missing if key in mismatched]

    def hint() -> str:
        if not heads:
            return (
                'the file has no heads: it is a backbone alone and cannot be evaluated; to train '
                'from it, give it as init_cfg of the backbone'
            )
        if mismatched:
            return (
                "for another number of classes, set reset_mismatched_heads=True in the config's "
                'CheckpointGuardHook: those layers then keep their initialization'
            )
        return 'the file is from another kind of model'

    raise_unless_equal(expected, heads, [key for key in missing if key not in reset], source, hint)
    require_loadable(expected, heads, source)
    return report(what, len(heads), len(expected), source, reset, [])


def _raise_if_norms_differ(backbone: nn.Module, keys: Collection[str], source: Source) -> None:
    in_file = {key.split('.')[1] for key in keys if key.startswith(('out_norms.', 'extra_norms.'))}
    out_norms = cast(nn.ModuleDict, backbone.out_norms)
    absent = sorted(set(out_norms) - in_file)
    if in_file and not len(out_norms):
        raise CheckpointError(f'{named(source)} was trained with output norms: set out_norm=True')
    if absent:
        raise CheckpointError(
            f'{named(source)} has no output norms for the stages '
            f'{", ".join(absent)}: set out_norm=False if it was trained without'
        )


def report(
    what: str,
    loaded: int,
    total: int,
    source: Source,
    fresh: Collection[str],
    left_over: Collection[str],
) -> str:
    """Return a line for the log on what was loaded.

    Args:
        what: What it was loaded into.
        loaded: How many tensors were loaded.
        total: How many tensors there are to load.
        source: The file.
        fresh: Names that were not in the file.
        left_over: Keys of the file that were not loaded.
    """
    line = f'{what}: loaded {loaded} of {total} tensors from {named(source)}'
    if fresh:
        line += f'; not in the file, left as initialized: {", ".join(fresh)}'
    if left_over:
        line += f'; left over in the file: {", ".join(map(shown, _groups(left_over)))}'
    return line


def _groups(keys: Collection[str]) -> list[str]:
    """Return the distinct first two parts of keys, which are enough for a message."""
    return list(dict.fromkeys('.'.join(key.split('.')[:2]) for key in keys))


def _hint(weights: Mapping[str, Tensor], backbone: PolyNeXt) -> str:
    """Say what a file that does not fit is, or what to check if it is not recognized."""
    if not any(key.startswith(('stem.', 'cells.', 'stages.')) for key in weights):
        return 'it has no weights of the backbone at all'
    try:
        arch = infer_arch(weights)
    except ValueError:
        return 'check that arch and checkpoint belong together'
    norm = norm_of(weights)
    if ARCHS[arch] != backbone.arch:
        return f'the file is of arch {arch!r}: set arch to that'
    if norm != backbone.norm:
        return f'the file is of a network with norm={norm!r}: set norm to that'
    stem = weights.get(_STEM)
    if stem is not None and stem.shape[1] != backbone.stem.weight.shape[1]:
        found, wanted = stem.shape[1], backbone.stem.weight.shape[1]
        hint = f'the file is for images of {found} channels, and in_channels={wanted}'
        if found == 3 and hasattr(backbone, 'adapt_stem'):
            hint += ': set adapt_stem=True in the backbone to adapt the stem, or in_channels=3'
        return hint
    return 'check that the file is complete'


def raise_unless_equal(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    missing: Collection[str],
    source: Source,
    hint: Callable[[], str],
) -> None:
    """Raise an error that names what is missing, unexpected or of a wrong shape, if anything is.

    Args:
        expected: Weights of the model.
        weights: Weights to be loaded.
        missing: Names whose absence is an error.
        source: The file.
        hint: Called for an addition to the message if there is an error.
    """
    unexpected = [key for key in weights if key not in expected]
    shapes = [
        f'{key} is {tuple(value.shape)} instead of {tuple(expected[key].shape)}'
        for key, value in weights.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = []
    for what, keys in (
        ('missing', missing),
        ('unexpected', unexpected),
        ('of a wrong shape', shapes),
    ):
        if keys:
            more = f' and {len(keys) - 4} more' if len(keys) > 4 else ''
            problems.append(f'{len(keys)} {what}: {", ".join(map(shown, list(keys)[:4]))}{more}')
    if problems:
        raise CheckpointError(f'{named(source)} does not fit: {"; ".join(problems)}; {hint()}')
