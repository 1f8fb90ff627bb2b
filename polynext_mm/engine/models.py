"""Our networks in the models of mm packages."""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from ..backbones.multiscale import MultiScale
from ..nn import PolyNeXt


def backbones(model: nn.Module) -> dict[str, MultiScale]:
    """Return the backbones of this package in a model, by their names."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MultiScale)
    }


def has_ours(model: Any) -> bool:
    """Return whether a module has a network of this package in it."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, (MultiScale, PolyNeXt)) for module in model.modules()
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without what wraps it for several processes or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
