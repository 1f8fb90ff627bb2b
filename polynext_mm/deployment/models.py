"""Load a backbone with all of its weights from a checkpoint."""

import importlib
from types import SimpleNamespace
from typing import Any

from mmengine.registry import MODELS

from .. import backbones
from ..weights import read
from .networks import UnsupportedModelError


def load_backbone(config: Any, checkpoint: str) -> tuple[SimpleNamespace, str]:
    """Build the backbone of a config alone and load its weights from a checkpoint.

    Args:
        config: An ``mmengine.Config`` of a segmentor, a detector or a bare backbone.
        checkpoint: Path, url or published name, of the whole model or of the backbone alone.

    Returns:
        Something with the attributes ``backbone``, in eval mode, and ``data_preprocessor``, which
        may be None, and the report on what was loaded.

    Raises:
        UnsupportedModelError: If the backbone is not one of this package.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read or does not fit.
    """
    settings = config.model.get('backbone', config.model)
    backbone = MODELS.build(settings)
    if not isinstance(backbone, backbones.MultiScale):
        raise UnsupportedModelError(
            f'{config.filename}: features of {type(backbone).__name__} cannot be exported, only '
            'those of PolyNeXt and MetaFormer'
        )
    preprocessor = config.model.get('data_preprocessor')
    if config.get('default_scope') is None:
        preprocessor = None  # the package that it belongs to is not known
    if preprocessor is not None:
        importlib.import_module(f'{config.default_scope}.models')
        preprocessor = MODELS.build(dict(preprocessor, _scope_=config.default_scope))
    weights = read(checkpoint)['state_dict']
    report = backbone.adapt(weights, '', checkpoint)
    backbone.load_state_dict(weights, strict=False)
    model = SimpleNamespace(backbone=backbone.eval(), data_preprocessor=preprocessor)
    return model, report
