"""Check that weights are dense, finite, and of a kind and range that the model can hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Union

import torch
from torch import Tensor

from .errors import CheckpointError, shown

Source = Union[str, os.PathLike, None]


def named(source: Source) -> str:
    """Return the name of a source in messages."""
    return 'the checkpoint' if source is None else str(source)


def require_tensors(weights: Mapping[Any, Any], source: Source) -> None:
    """Check that names are strings and weights are dense tensors with data.

    Raises:
        CheckpointError: If one is not, naming it.
    """
    for key, value in weights.items():
        problem = None
        if not isinstance(key, str):
            raise CheckpointError(
                f'{named(source)}: the key {shown(repr(key))} is not a name of a weight'
            )
        if not isinstance(value, Tensor):
            problem = f'a {type(value).__name__}'
            if type(value).__module__ == 'numpy':
                problem = f'a NumPy {type(value).__name__}'
        elif value.is_quantized:
            problem = 'quantized'
        elif value.layout is not torch.strided or value.is_nested:
            problem = 'sparse'
        elif value.device.type == 'meta':
            problem = 'on the meta device, without numbers'
        if problem:
            raise CheckpointError(
                f'{named(source)}: {shown(key)} is {problem} instead of a dense tensor'
            )


def require_loadable(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Source
) -> None:
    """Check that a model can hold the values of weights with fitting shapes.

    Args:
        expected: Weights of the model; those on the meta device count as float32.
        weights: Weights to be loaded.
        source: The file, for messages.

    Raises:
        CheckpointError: If one is of another kind (integers, bools, complex numbers), not finite,
            outside the range of the model's dtype, or a negative variance.
    """
    for key, value in weights.items():
        if key not in expected:
            continue
        dtype = expected[key].dtype
        problem = _problem(key, value, dtype)
        if problem:
            raise CheckpointError(f'{named(source)}: {key} {problem}')


def _problem(key: str, value: Tensor, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point:  # a counter, which some files store as floating point
        if value.is_complex() or value.dtype is torch.bool:
            return f'is {value.dtype} instead of whole numbers'
        counts = bool((value >= 0).all() and (value == value.long()).all())
        return None if counts else 'counts something, and is no whole number from 0 up'
    if not value.is_floating_point():
        return f'is {value.dtype} instead of floating point'
    if value.dtype.itemsize == 1:  # torch cannot compare these dtypes
        value = value.float()
    if not value.isfinite().all():
        return f'has {(~value.isfinite()).sum()} values that are not finite (nan or inf)'
    if torch.finfo(value.dtype).max > torch.finfo(dtype).max:
        if not value.to(dtype).isfinite().all():
            return f'has values beyond the range of {dtype}, of which the model is'
    if key.endswith('running_var') and (value < 0).any():
        return 'has negative variances'
    return None


def require_whole_norms(
    missing: Collection[str], weights: Mapping[str, Tensor], source: Source
) -> None:
    """Check that no norm is incomplete, such as with a weight but no bias.

    Args:
        missing: Names of norms' weights that are not in the file.
        weights: Weights to be loaded, in the model's names.
        source: The file, for messages.

    Raises:
        CheckpointError: If the file has some weights of a norm but not all.
    """
    for key in missing:
        module = key.rpartition('.')[0]
        present = [
            other
            for other in weights
            if other.rpartition('.')[0] == module and not other.endswith('num_batches_tracked')
        ]
        if present and not key.endswith('num_batches_tracked'):
            raise CheckpointError(
                f'{named(source)} has {present[0]} and no {key}: a norm is loaded whole or not '
                'at all'
            )
