"""Load weights strictly: every key is accounted for, or an error names what does not fit."""

import os
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ..nn import ARCHS
from .names import (
    BACKBONE,
    DROPOUT_RATE,
    infer_arch,
    is_authors,
    norm_of,
    norm_size,
    split_backbone,
    translate,
    unwrapped,
)
from .reading import CheckpointError, read

Source = str | os.PathLike | None


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
    weights = read(source)['state_dict']
    if hasattr(model, 'backbone'):
        adapt(model.backbone, weights, BACKBONE, source)
        report = check(model, weights, source)
    else:
        report = adapt(model, weights, '', source)
    model.load_state_dict(weights, strict=False)
    return report


def adapt(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, source: Source = None
) -> str:
    """Replace a PolyNeXt's weights in ``state_dict`` by what it loads, after a strict check.

    Marks of DDP and torch.compile are taken off the keys, and the authors' names are translated.

    Args:
        backbone: A PolyNeXt, with or without output norms or classifier.
        state_dict: Weights, changed in place; keys that begin with ``prefix`` are the backbone's.
            If ``prefix`` is empty, they may be a whole segmentor's, whose heads are left over.
        prefix: Where the backbone is in the model: '' or a name and a dot.
        source: The file, for messages.

    Returns:
        The report.

    Raises:
        CheckpointError: If a shape is wrong, or anything is missing or left over but output norms
            and, for a backbone without one, the classifier.
    """
    weights = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        weights[unwrapped(key[len(prefix) :])] = state_dict.pop(key)
    left_over = []
    if not prefix:
        inner, heads = split_backbone(weights)
        if inner:
            weights, left_over = inner, list(heads)
    given = weights
    if is_authors(weights):
        weights = translate(weights, backbone.arch)
    expected = _expected(backbone, weights)
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
    state_dict.update({prefix + key: value for key, value in weights.items()})
    return report('PolyNeXt', len(weights), len(expected), source, fresh, left_over)


def _expected(backbone: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a state dict of a PolyNeXt holds, its norms having the size of ``weights``."""
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
) -> str:
    """Check that the heads of a model take ``state_dict``; its backbone is for :func:`adapt`.

    Args:
        model: A segmentor or detector whose ``backbone`` is a PolyNeXt.
        state_dict: Weights. Those of heads that keep their initialization are removed.
        source: The file, for messages.
        reset_mismatched_heads: Whether layers whose shape differs, as with another number of
            classes, keep their initialization. Without effect in evaluation.
        evaluation: Whether to refuse what may start a training but is not the whole model: a file
            without heads, or one with output norms where the model has none, or vice versa.

    Returns:
        The report.

    Raises:
        CheckpointError: If weights of heads are missing, left over, or of another shape.
    """
    _, expected = split_backbone(model.state_dict())
    backbone, heads = split_backbone(state_dict)
    what = f'{type(model).__name__} heads'
    if evaluation:
        _raise_if_norms_differ(model.backbone, backbone, source)
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
            return 'the file has no heads: it is a backbone alone and cannot be evaluated'
        if mismatched:
            return (
                "for another number of classes, set reset_mismatched_heads=True in the config's "
                'CheckpointGuardHook: those layers then keep their initialization'
            )
        return 'the file is from another kind of model'

    raise_unless_equal(expected, heads, [key for key in missing if key not in reset], source, hint)
    return report(what, len(heads), len(expected), source, reset, [])


def _raise_if_norms_differ(
    backbone: nn.Module, weights: Mapping[str, Tensor], source: Source
) -> None:
    in_file = {
        key.split('.')[1] for key in weights if key.startswith(('out_norms.', 'extra_norms.'))
    }
    absent = sorted(set(backbone.out_norms) - in_file)
    if in_file and not len(backbone.out_norms):
        raise CheckpointError(f'{_named(source)} was trained with output norms: set out_norm=True')
    if absent:
        raise CheckpointError(
            f'{_named(source)} has no output norms for the stages '
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
    line = f'{what}: loaded {loaded} of {total} tensors from {_named(source)}'
    if fresh:
        line += f'; not in the file, left as initialized: {", ".join(fresh)}'
    if left_over:
        line += f'; left over in the file: {", ".join(_groups(left_over))}'
    return line


def _groups(keys: Collection[str]) -> list[str]:
    """Return the different first two parts of keys, which is enough for a message."""
    return list(dict.fromkeys('.'.join(key.split('.')[:2]) for key in keys))


def _named(source: Source) -> str:
    return 'the checkpoint' if source is None else str(source)


def _hint(weights: Mapping[str, Tensor], backbone: nn.Module) -> str:
    """Say what a file that does not fit is, or what to check if that cannot be told."""
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
    return 'check in_channels, and that the file is complete'


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
        hint: What to tell the user besides; called if there is an error.
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
            problems.append(f'{len(keys)} {what}: {", ".join(list(keys)[:4])}{more}')
    if problems:
        raise CheckpointError(f'{_named(source)} does not fit: {"; ".join(problems)}; {hint()}')
