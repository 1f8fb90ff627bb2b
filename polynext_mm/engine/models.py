"""Our networks in the models of mm packages."""

from __future__ import annotations

from typing import cast

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from ..backbones.multiscale import MultiScale


def backbones(model: nn.Module) -> dict[str, MultiScale]:
    """Return the backbones of this package in a model, by their names."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MultiScale)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without its wrappers for several processes or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model
