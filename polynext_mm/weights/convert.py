"""Checkpoint files in the authors' names written in ours, and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import ARCHS, PolyNeXt
from . import files, loading, names
from .files import BACKBONE, CheckpointError

_NAMINGS = {'ours': 'our names', 'authors': "the authors' names"}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = 'ours',
    arch: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a backbone or a whole segmentor under the other names. Values and heads stay as they are.

    What is written holds weights and the plain part of ``meta``: a backbone in the authors' names is a
    bare dict, as the published ones are; all others are ``dict(meta=..., state_dict=...)``.

    Args:
        source: Path or url, as of :func:`polynext_mm.weights.read`.
        target: Path of the file to write.
        to (str): 'ours' or 'authors'.
        arch (str | None): A name of ``polynext_mm.nn.ARCHS``; told from the weights by default.
        overwrite (bool): Replace ``target`` if it exists. Defaults to False.

    Returns:
        str: What was written.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If ``target`` exists, unless told to replace it.
        ValueError: For an unknown ``to`` or ``arch``, or a ``target`` that is not .pt or .pth.
        CheckpointError: If the file cannot be read, is not a PolyNeXt's, or has these names already.
    """
    target = Path(target).expanduser()
    if to not in _NAMINGS:
        raise ValueError(f'to must be one of {tuple(_NAMINGS)}, got {to!r}')
    if target.suffix not in ('.pt', '.pth'):
        raise ValueError(f'the file to write must end in .pt or .pth, got {target}')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} is there already')
    checkpoint = files.read(source)
    weights = checkpoint['state_dict']
    backbone = {
        key.removeprefix(BACKBONE): value
        for key, value in weights.items()
        if key.startswith(BACKBONE)
    }
    heads = {key: value for key, value in weights.items() if not key.startswith(BACKBONE)}
    arch = arch or _inferred(backbone, source)
    converted = _renamed(backbone, to, arch, source)
    if heads:
        converted = {BACKBONE + key: value for key, value in converted.items()} | heads
    bare = to == 'authors' and not heads
    _write(
        converted if bare else dict(meta=_plain(checkpoint['meta']), state_dict=converted), target
    )
    return (
        f'{target}: {arch} in {_NAMINGS[to]}, {len(backbone)} tensors of the backbone and '
        f'{len(heads)} of heads'
    )


def _inferred(backbone: Mapping[str, Tensor], source) -> str:
    try:
        return names.infer_arch(backbone)
    except ValueError as error:
        raise CheckpointError(
            f'{source}: {error}; give the arch to learn what does not fit'
        ) from error


def _renamed(backbone: dict[str, Tensor], to: str, arch: str, source) -> dict[str, Tensor]:
    """The weights of a backbone under the other names, strictly checked."""
    if names.is_authors(backbone) == (to == 'authors'):
        raise CheckpointError(f'{source} has {_NAMINGS[to]} already')
    stem = backbone.get('stem.weight')
    with torch.device('meta'):
        network = PolyNeXt(arch, 3 if stem is None else stem.shape[1], norm=names.norm_of(backbone))
    loading.adapt(network, backbone.copy(), '', source)
    # no weight, and of no use here: it waits for the way back
    kept = {key: value for key, value in backbone.items() if key == names.DROPOUT_RATE}
    weights = {key: value for key, value in backbone.items() if key not in kept}
    translate = names.translate if to == 'ours' else names.translate_back
    try:
        return translate(weights, ARCHS[arch]) | kept
    except ValueError as error:
        raise CheckpointError(f'{source}: {error}') from error


def _plain(value: Any) -> Any:
    """Without all that is not of Python's own plain types, which every reader takes."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if _is_plain(item)}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value if _is_plain(item))
    return value


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool, dict, list, tuple)


def _write(content: dict, target: Path) -> None:
    """Whole or not at all."""
    partial = target.with_name(f'{target.name}.{os.getpid()}.part')
    try:
        torch.save(content, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
