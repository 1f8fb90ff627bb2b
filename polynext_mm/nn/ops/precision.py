"""The dtype rules: what may be computed in half precision, and what never is.

Convolutions and matrix products follow autocast. Norms, powers, sums and the residual stream are
float32, or float64 where the input is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-5


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of convolutions and matrix products on ``x``: autocast's, where it is on."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(device):  # such as meta
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of norms, powers and sums of ``x``: never half."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is."""
    return x.to(wide_dtype(x))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x weight^T`` in the dtype of matrix products."""
    dtype = matmul_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype))


def layer_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the LN of ``x`` over its last dimension, without bias, in float32 or wider."""
    return F.layer_norm(
        wide(x), x.shape[-1:], None if weight is None else wide(weight), None, LN_EPS
    )
