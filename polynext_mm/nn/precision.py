"""In which types things are computed, with and without autocast."""

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type of convolutions and matrix products on ``x``: autocast's, where it is on."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(device):  # meta, for one
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type of norms, powers and sums of ``x``: never half."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))
