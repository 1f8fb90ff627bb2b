"""Dtype rules: what may be computed in half precision, and what never is.

Convolutions and matrix products follow autocast, which leaves the residual stream in float32. A
norm returns the dtype of its input. Its statistics, powers and sums are float32, or float64 if the
input is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compat.torch_features import autocast_dtype

LN_EPS = 1e-5


class Like(NamedTuple):
    """What decisions need to know about a map that may not exist yet."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


def matmul_dtype(x: Tensor | Like) -> torch.dtype:
    """Return the dtype of convolutions and matrix products on ``x``: autocast's, if it is on."""
    device = x.device.type
    if device == 'meta':  # it stands for an accelerator
        device = 'cuda'
    if x.dtype is torch.float64:
        return x.dtype
    return autocast_dtype(device) or x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of norms, powers and sums of ``x``: never half precision."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is."""
    return x.to(wide_dtype(x))


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the LN of ``x`` over its last dimension, without bias, in its dtype."""
    weight = None if weight is None else wide(weight)
    return F.layer_norm(wide(x), x.shape[-1:], weight, None, LN_EPS).to(x.dtype)
