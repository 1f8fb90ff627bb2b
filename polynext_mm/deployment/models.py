"""Models with all weights of a checkpoint, or an error."""

import importlib
from types import SimpleNamespace
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from .. import backbones
from ..weights import loading, read, safe_reading

TASKS = ('mmseg', 'mmdet')


def load_model(config: Any, checkpoint: str, device: str = 'cpu') -> nn.Module:
    """Build the segmentor or detector of a config and load every weight of a checkpoint.

    Args:
        config: An ``mmengine.Config``.
        checkpoint: Path, url or published name, of our files or the authors'.
        device: Where the model goes.

    Returns:
        The model in eval mode, as mmseg's ``init_model`` or mmdet's ``init_detector`` returns it.

    Raises:
        ValueError: If the config's ``default_scope`` does not name the task.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or does not fit backbone and heads.
    """
    if config.get('default_scope') not in TASKS:
        raise ValueError(
            f'{config.filename}: default_scope must be one of {", ".join(TASKS)}, since it names '
            f'the task; got {config.get("default_scope")!r}'
        )
    if config.default_scope == 'mmdet':
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import init_model as init
    with safe_reading():
        model = init(config, checkpoint, device=device)
    # The backbone checks itself on loading; mm merely warns about heads that do not fit.
    if isinstance(model.backbone, backbones.MultiScale):
        loading.check(model, read(checkpoint)['state_dict'], checkpoint, evaluation=True)
    return model


def load_backbone(config: Any, checkpoint: str) -> tuple[nn.Module, str]:
    """Build the backbone of a config alone and load its weights from a checkpoint.

    Args:
        config: An ``mmengine.Config`` of a segmentor, a detector or a bare backbone.
        checkpoint: As of :func:`load_model`, or a file of the backbone alone.

    Returns:
        What has the backbone, in eval mode, and the preprocessor of the model's images as
        ``backbone`` and ``data_preprocessor``, and the report on what was loaded.

    Raises:
        ValueError: If the backbone is none of this package's.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read or does not fit.
    """
    settings = config.model.get('backbone', config.model)
    backbone = MODELS.build(settings)
    if not isinstance(backbone, backbones.MultiScale):
        raise ValueError(
            f'{config.filename}: features of {type(backbone).__name__} cannot be exported, only '
            'those of PolyNeXt and MetaFormer'
        )
    preprocessor = config.model.get('data_preprocessor')
    if preprocessor is not None:
        importlib.import_module(f'{config.default_scope}.models')
        preprocessor = MODELS.build(dict(preprocessor, _scope_=config.default_scope))
    weights = read(checkpoint)['state_dict']
    report = backbone.adapt(weights, '', checkpoint)
    backbone.load_state_dict(weights, strict=False)
    model = SimpleNamespace(backbone=backbone.eval(), data_preprocessor=preprocessor)
    return model, report
