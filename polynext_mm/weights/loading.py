"""Loading, strictly: every key accounted for, or an error that names what was wrong."""

import os
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from ..nn import ARCHS
from . import files, names
from .files import BACKBONE, CheckpointError


def load(model: nn.Module, source: str | os.PathLike) -> str:
    """Load a checkpoint into a backbone, a classifier or a whole segmentor, strictly.

    Args:
        model (nn.Module): A ``PolyNeXt``, a ``PolyNeXtClassifier``, or a model with one as ``backbone``.
        source: Path or url, as of :func:`polynext_mm.weights.read`.

    Returns:
        str: The report, "loaded N of M ...".

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read or does not fit.
    """
    weights = files.read(source)['state_dict']
    if hasattr(model, 'backbone'):
        adapt(model.backbone, weights, BACKBONE, source)
        report = check(model, weights, source)
    else:
        report = adapt(model, weights, '', source)
    model.load_state_dict(weights, strict=False)
    return report


def adapt(backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, source=None) -> str:
    """Give a PolyNeXt its keys in ``state_dict``, in place: translated, unwrapped, checked.

    Args:
        backbone (nn.Module): A PolyNeXt, with or without output norms or classifier.
        state_dict (dict): Weights; those behind ``prefix`` are the backbone's. Where the backbone is the
            root (prefix ''), a whole segmentor's will do, and its heads are left over.
        prefix (str): '' or one that ends in a dot.
        source: The file, for the report.

    Returns:
        str: The report.

    Raises:
        CheckpointError: If anything but output norms (and, for a backbone alone, the classifier) is
            missing or left over, or a shape is wrong.
    """
    weights = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        weights[files.unwrapped(key[len(prefix) :])] = state_dict.pop(key)
    left_over = []
    if not prefix and any(key.startswith(BACKBONE) for key in weights):
        left_over = [key for key in weights if not key.startswith(BACKBONE)]
        weights = {
            key[len(BACKBONE) :]: value
            for key, value in weights.items()
            if key.startswith(BACKBONE)
        }
    problem = names.unsupported(weights)
    if problem:
        raise CheckpointError(f'{_named(source)}: {problem}')
    given = weights
    if names.is_authors(weights):
        weights = names.translate(weights, backbone.arch)
    expected = backbone.state_dict()
    optional = [
        key
        for key in weights
        if key not in expected
        and (key.startswith(('head.', 'out_norms.')) or key == names.DROPOUT_RATE)
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


def check(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source=None,
    reset_mismatched_heads: bool = False,
    evaluation: bool = False,
) -> str:
    """Check that a whole model takes ``state_dict``, the keys of whose backbone are for :func:`adapt`.

    Args:
        model (nn.Module): A segmentor or detector whose ``backbone`` is a PolyNeXt.
        state_dict (dict): Weights. Heads that do not fit are taken out, if they may be.
        source: The file, for the report.
        reset_mismatched_heads (bool): Let last layers of another shape (another number of classes) keep
            their initialization instead of stopping. Not in evaluation.
        evaluation (bool): Refuse what could start a training and is not a whole model: a file without
            heads, or with output norms where the model has none, or the other way round.

    Returns:
        str: The report.

    Raises:
        CheckpointError: If heads are missing in part, left over, or of another shape.
    """
    expected = {
        key: value for key, value in model.state_dict().items() if not key.startswith(BACKBONE)
    }
    heads = {key: value for key, value in state_dict.items() if not key.startswith(BACKBONE)}
    if evaluation:
        _raise_if_norms_differ(model.backbone, state_dict, source)
    elif not heads:
        return report(
            type(model).__name__ + ' heads', 0, len(expected), source, _groups(expected), []
        )
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
                "for another number of classes, set reset_mismatched_heads=True of the config's "
                'CheckpointGuardHook: those layers then start afresh'
            )
        return 'the file is of another kind of model'

    raise_unless_equal(expected, heads, [key for key in missing if key not in reset], source, hint)
    return report(type(model).__name__ + ' heads', len(heads), len(expected), source, reset, [])


def _raise_if_norms_differ(backbone: nn.Module, state_dict: Mapping[str, Tensor], source) -> None:
    in_file = {
        key.split('.')[2]
        for key in state_dict
        if key.startswith((f'{BACKBONE}out_norms.', f'{BACKBONE}extra_norms.'))
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
    what: str, loaded: int, total: int, source, fresh: Collection[str], left_over: Collection[str]
) -> str:
    """One line for the log."""
    line = f'{what}: loaded {loaded} of {total} tensors from {_named(source)}'
    if fresh:
        line += f'; not in the file, left as initialized: {", ".join(fresh)}'
    if left_over:
        line += f'; left over in the file: {", ".join(_groups(left_over))}'
    return line


def _groups(keys: Collection[str]) -> list[str]:
    """Keys by their first two names, for messages."""
    return list(dict.fromkeys('.'.join(key.split('.')[:2]) for key in keys))


def _named(source) -> str:
    return 'the checkpoint' if source is None else str(source)


def _hint(weights: Mapping[str, Tensor], backbone: nn.Module) -> str:
    """What the file is, if that can be told."""
    if not any(key.startswith(('stem.', 'cells.', 'stages.')) for key in weights):
        return 'it has no weights of the backbone at all'
    try:
        arch = names.infer_arch(weights)
    except ValueError:
        return 'check that arch and checkpoint belong together'
    if ARCHS[arch] != backbone.arch:
        return f'the file is of arch {arch!r}: set arch to that'
    return 'check in_channels, and that the file is whole'


def raise_unless_equal(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    missing: Collection[str],
    source,
    hint: Callable[[], str],
) -> None:
    """Raise a CheckpointError that names what is missing, unexpected or of another shape, if any."""
    problems = []
    unexpected = [key for key in weights if key not in expected]
    shapes = [
        f'{key} is {tuple(value.shape)} instead of {tuple(expected[key].shape)}'
        for key, value in weights.items()
        if key in expected and value.shape != expected[key].shape
    ]
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
