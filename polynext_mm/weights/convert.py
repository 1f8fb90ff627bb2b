"""Convert checkpoint files from the authors' names to ours and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import ARCHS, PolyNeXt
from . import loading, names
from .errors import CheckpointError
from .files import checksum_path, replacing, sha256_of
from .reading import read

_NAMINGS = {'ours': 'our names', 'authors': "the authors' names"}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = 'ours',
    arch: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a backbone or a whole segmentor in the other names.

    Values and heads stay as they are. The file written holds the weights and the part of ``meta``
    that consists of plain Python values. A backbone in the authors' names is a bare dict, as in
    their release; everything else is ``dict(meta=..., state_dict=...)``. The SHA-256 of the file
    goes beside it, into ``TARGET.sha256``, and reading verifies it.

    Args:
        source: Path, url or published name, as for :func:`polynext_mm.weights.read`.
        target: Path of the file to write, .pt or .pth.
        to: Whose names to write, 'ours' or 'authors'.
        arch: A name in ``polynext_mm.nn.ARCHS``; inferred from the weights by default.
        overwrite: Whether ``target`` is replaced if it exists.

    Returns:
        A line that describes what was written.

    Raises:
        FileNotFoundError: If there is no file ``source``.
        FileExistsError: If ``target`` exists and ``overwrite`` is False.
        ValueError: If ``to``, ``arch`` or the suffix of ``target`` is not a valid one.
        CheckpointError: If the file cannot be read, is not a PolyNeXt's, or is in these names
            already.
    """
    target = Path(target).expanduser()
    if to not in _NAMINGS:
        raise ValueError(f'to must be one of {tuple(_NAMINGS)}, got {to!r}')
    if target.suffix not in ('.pt', '.pth'):
        raise ValueError(f'the file to write must end in .pt or .pth, got {target}')
    if target.exists() and not overwrite:
        raise FileExistsError(f'{target} exists')
    checkpoint = read(source)
    backbone, heads = names.split_backbone(checkpoint['state_dict'])
    arch = arch or _infer_arch(backbone, source)
    converted = _rename(backbone, to, arch, source)
    content: dict[str, Any] = converted
    if heads or to == 'ours':
        weights = names.join_backbone(converted, heads) if heads else converted
        content = dict(meta=_plain(checkpoint['meta']), state_dict=weights)
    _write(content, target)
    return (
        f'{target}: {arch} in {_NAMINGS[to]}, {len(backbone)} tensors of the backbone and '
        f'{len(heads)} of heads'
    )


def _infer_arch(backbone: Mapping[str, Tensor], source: str | os.PathLike) -> str:
    try:
        return names.infer_arch(backbone)
    except ValueError as error:
        raise CheckpointError(
            f'{source}: {error}; give the arch to see which weights do not fit'
        ) from error


def _rename(
    backbone: dict[str, Tensor], to: str, arch: str, source: str | os.PathLike
) -> dict[str, Tensor]:
    """Return the weights of a backbone in the other names, strictly checked."""
    if names.is_authors(backbone) == (to == 'authors'):
        raise CheckpointError(f'{source} has {_NAMINGS[to]} already')
    stem = backbone.get('stem.weight')
    with torch.device('meta'):
        network = PolyNeXt(arch, 3 if stem is None else stem.shape[1], norm=names.norm_of(backbone))
    loading.adapt(network, backbone.copy(), '', source)
    # not a weight and unused here: kept for converting back
    kept = {key: value for key, value in backbone.items() if key == names.DROPOUT_RATE}
    weights = {key: value for key, value in backbone.items() if key not in kept}
    translate = names.translate if to == 'ours' else names.translate_back
    try:
        return translate(weights, ARCHS[arch]) | kept
    except ValueError as error:
        raise CheckpointError(f'{source}: {error}') from error


def _plain(value: Any) -> Any:
    """Return a value without parts that are not of plain Python types.

    Every reader accepts plain types, restricted ones too.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if _is_plain(item)}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value if _is_plain(item))
    return value


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool, dict, list, tuple)


def _write(content: dict, target: Path) -> None:
    """Write a file and its checksum beside it; on failure, keep what was there."""
    checksum = checksum_path(target)
    with replacing(target) as partial:
        torch.save(content, partial)
        line = f'{sha256_of(partial)}  {target.name}\n'
        checksum.unlink(missing_ok=True)  # the checksum of the file that is replaced
    with replacing(checksum) as partial:
        partial.write_text(line)
