"""Read checkpoint files, without executing anything in them, and bring them to one form.

The form is mmengine's: ``dict(state_dict=..., meta=...)`` plus whatever else an mm checkpoint
holds. The keys of the backbone have the prefix ``backbone.``. Names are still those of the file:
they are translated on loading, where the arch is known
(:mod:`polynext_mm.weights.loading`).

This module needs only torch. NumPy, mmengine and safetensors are imported only for files that need
them.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import containers
from .downloads import local_path
from .errors import CheckpointError, shown
from .names import BACKBONE, is_backbone, join_backbone, renamed, split_backbone, unwrapped
from .tensor_checks import require_tensors

#: Prefix of a path, url or published name that may execute code when it is read.
UNSAFE = 'unsafe:'

# Keys in which the authors' reader looks for weights: averages first.
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema')
_WEIGHTS = ('state_dict', 'model')


def read(source: str | os.PathLike, map_location: containers.MapLocation = 'cpu') -> dict:
    """Read a checkpoint and bring it to the form described above.

    Args:
        source: Path, http(s) url or ``polynext://NAME``, with NAME of ``weights.PUBLISHED``. The
            file, .pt, .pth or .safetensors, is one of the authors', in any container that their
            release reads or writes, or one of ours. After ``unsafe:`` it is read with all of
            pickle, which executes what the file says.
        map_location: As for ``torch.load``, None being the CPU; for .safetensors a device or None.

    Returns:
        The checkpoint, with ``state_dict`` and ``meta``. The log statistics in an mm checkpoint
        are mmengine's ``HistoryBuffer``, or bare attributes where mmengine is not installed.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the name is not a published one, or the file cannot be downloaded, is
            damaged, needs code to be executed, or holds no weights.
        ImportError: If the file is .safetensors and safetensors is not installed.
        ValueError: If the file is .safetensors and ``map_location`` is not a device or None.
    """
    return normalize(*_content(source, map_location))


@contextlib.contextmanager
def safe_reading() -> Iterator[None]:
    """Do nothing: mm's loader reads every file safely once polynext_mm is imported.

    It stays for code that was written when other people's models were read safely only inside it.
    """
    yield


def read_as_it_is(source: str | os.PathLike, map_location: containers.MapLocation = 'cpu') -> Any:
    """Read a checkpoint as :func:`read` does, but leave those of other networks as they are.

    Their weights do record the name of the file, for messages, and ``meta`` loses the config text,
    which mmengine would execute on resuming.
    """
    content, path = _content(source, map_location)
    if not isinstance(content, Mapping):
        return content
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    if any(_is_ours(part) for part in parts):
        return normalize(content, path)
    if not isinstance(content.get('state_dict'), Mapping):
        return named(content, path)
    whole = _without_config(content)
    for key in ('state_dict', 'ema_state_dict'):
        if isinstance(whole.get(key), Mapping):
            whole[key] = named(whole[key], path)
    return whole


def _content(source: str | os.PathLike, map_location: containers.MapLocation) -> tuple[Any, Path]:
    source = os.fspath(source)
    path = local_path(source.removeprefix(UNSAFE))
    if source.startswith(UNSAFE) and path.suffix != '.safetensors':
        containers.require_file(path)
        return torch.load(path, map_location=map_location, weights_only=False), path
    return containers.load(path, map_location), path


def _is_ours(weights: Mapping) -> bool:
    """Return whether weights have the keys of a PolyNeXt, alone or in a whole model."""
    names = (unwrapped(key) for key in weights if isinstance(key, str))
    return is_backbone({name.removeprefix(BACKBONE) for name in names})


def named(weights: Mapping, source: str | os.PathLike) -> OrderedDict:
    """Return weights with the name of their file as ``source`` in the metadata of each module."""
    result = OrderedDict(weights)
    old = getattr(weights, '_metadata', {})
    result._metadata = {  # type: ignore[attr-defined] # where torch looks for it
        prefix: {**old.get(prefix, {}), 'source': str(source)} for prefix in _modules(weights)
    }
    return result


def _modules(keys: Iterable[Any]) -> set[str]:
    modules = {''}
    for key in keys:
        parts = key.split('.') if isinstance(key, str) else []
        modules.update('.'.join(parts[:length]) for length in range(1, len(parts)))
    return modules


def _without_config(checkpoint: Mapping) -> dict:
    whole = dict(checkpoint)
    if isinstance(whole.get('meta'), Mapping):
        whole['meta'] = {key: value for key, value in whole['meta'].items() if key != 'config'}
    return whole


def normalize(checkpoint: Any, source: str | os.PathLike) -> dict:
    """Bring the content of a file to the form described above.

    Args:
        checkpoint: What the file holds.
        source: The file, for messages, here and when the weights are loaded.

    Raises:
        CheckpointError: If it holds no weights, or something else in their place.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    if isinstance(checkpoint.get('meta'), Mapping):
        whole = _without_config(checkpoint)
        # mm keeps an average, if it has one, in state_dict itself
        weights = checkpoint.get('state_dict')
    else:
        whole = {'meta': {}}
        weights = _find_weights(checkpoint)
    if not isinstance(weights, Mapping) or not any(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise CheckpointError(
            f'{source} holds no weights: its keys are {", ".join(map(shown, list(checkpoint)[:8]))}'
        )
    require_tensors(weights, source)
    try:
        backbone, others = split_backbone(renamed(weights, unwrapped))
    except ValueError as error:
        raise CheckpointError(f'{source}: {error}') from error
    if is_backbone(others):  # a bare backbone, with its classifier
        if backbone:
            raise CheckpointError(
                f'{source} holds two backbones: with the prefix backbone. and without it'
            )
        backbone, others = others, {}
    whole['state_dict'] = named(join_backbone(backbone, others), source)
    if isinstance(whole.get('ema_state_dict'), Mapping):
        whole['ema_state_dict'] = named(whole['ema_state_dict'], source)
    return whole


def _find_weights(checkpoint: Mapping) -> Mapping:
    """Return the weights in one of the authors' containers: the average, if it was updated."""
    average = checkpoint.get('ema_state_dict')
    if isinstance(average, Mapping) and _is_averaged(average.get('n_averaged', 1)):
        return {key: value for key, value in average.items() if key != 'n_averaged'}
    for name in (*_AVERAGES, *_WEIGHTS):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    # bare weights, perhaps with an epoch number or the like among them
    return {
        key: value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor) or not isinstance(key, str) or '.' in key
    }


def _is_averaged(count: Any) -> bool:
    is_number = isinstance(count, (int, float, Tensor)) and getattr(count, 'ndim', 0) == 0
    return is_number and count > 0
