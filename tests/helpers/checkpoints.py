"""Files as the authors' are, and whether a model has what they hold."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections import OrderedDict

import torch
from mmengine.config import Config
from torch import Tensor, nn

from polynext_mm.nn import ARCHS
from tests.golden import Golden, authors_weights, image
from tests.helpers.configs import build_model
from tests.helpers.networks import ARCH, SIZE, build


@functools.cache
def imagenet_weights(arch: str = ARCH) -> dict[str, Tensor]:
    """Return what a published ImageNet file holds, by the golden recipe."""
    return Golden(arch).state_dict()


def other_weights(arch: str = ARCH) -> dict[str, Tensor]:
    """Return weights for the same network that must not be loaded."""
    return {key: value + 1 for key, value in imagenet_weights(arch).items()}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def _training_checkpoint(average: dict, last: dict, n_averaged: int) -> dict:
    return dict(
        epoch=7,
        arch=ARCH,
        args=Namespace(lr=1e-3, data='imagenet'),
        metric=80.1,
        state_dict=prefixed('module.', last),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
        ema_state_dict=dict(n_averaged=torch.tensor(n_averaged), **prefixed('module.', average)),
    )


# Every container that the authors' release reads or writes, holding imagenet_weights().
CONTAINERS = {
    'bare': lambda: imagenet_weights(),
    'state_dict': lambda: dict(state_dict=imagenet_weights(), epoch=3, args=Namespace(lr=0.1)),
    'model': lambda: dict(model=OrderedDict(imagenet_weights())),
    'module.': lambda: dict(state_dict=prefixed('module.', imagenet_weights())),
    'state_dict_ema': lambda: dict(state_dict=other_weights(), state_dict_ema=imagenet_weights()),
    'model_ema': lambda: dict(model=other_weights(), model_ema=imagenet_weights()),
    'ema': lambda: dict(ema=prefixed('module.', imagenet_weights()), state_dict=other_weights()),
    'averaged': lambda: _training_checkpoint(imagenet_weights(), other_weights(), 12),
    'never averaged': lambda: _training_checkpoint(other_weights(), imagenet_weights(), 0),
}


def output_norms(arch: str = ARCH) -> dict[str, Tensor]:
    """Return the output norms of the authors' dense-prediction backbone."""
    return authors_weights(
        {
            f'extra_norms.{stage}.{kind}': (width,)
            for stage, width in enumerate(ARCHS[arch].widths)
            for kind in ('weight', 'bias')
        }
    )


def head_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return weights for the heads of a segmentor, by the golden recipe where it has one."""
    shapes = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.startswith('backbone.')
    }
    weights = authors_weights({k: s for k, s in shapes.items() if not k.endswith('running_var')})
    counts = {k: v.long() for k, v in weights.items() if k.endswith('num_batches_tracked')}
    variances = {k: torch.full(s, 2.0) for k, s in shapes.items() if k.endswith('running_var')}
    return weights | counts | variances


def segmentor_file(cfg: Config, backbone_prefix: str = 'backbone.', **meta) -> dict:
    """Return an mmseg checkpoint as the authors' are: backbone in their names, heads in mmseg's."""
    backbone = {
        k: v
        for k, v in imagenet_weights(cfg.model.backbone.arch).items()
        if k.startswith(('stem', 'cells', 'reductions'))
    }
    state_dict = OrderedDict(
        prefixed(backbone_prefix, backbone | output_norms(cfg.model.backbone.arch))
    )
    state_dict.update(head_weights(build_model(cfg)))
    return dict(meta=dict(meta, epoch=0, iter=160000), state_dict=state_dict)


def is_golden(backbone: nn.Module) -> bool:
    """Return whether a backbone without output norms computes the golden numbers."""
    with torch.no_grad():
        features = backbone.eval()(image(SIZE))
    for stage, feature in enumerate(features):
        index, value, absmean = Golden(ARCH).values(SIZE, stage)
        off = (feature.contiguous().flatten()[index] - value).abs().max()
        if not off <= 1e-4 * absmean:
            return False
    return len(features) == 4


def is_golden_and_normed(backbone: nn.Module) -> bool:
    """Return whether a backbone with the authors' output norms computes them, normed."""
    weights, reference = output_norms(), build(arch=ARCH, out_norm=False)
    reference.load_state_dict(imagenet_weights(), strict=False)
    with torch.no_grad():
        assert is_golden(reference)
        features, expected = backbone.eval()(image(SIZE)), reference(image(SIZE))
    for stage, (feature, raw) in enumerate(zip(features, expected)):
        weight, bias = (weights[f'extra_norms.{stage}.{kind}'] for kind in ('weight', 'bias'))
        normed = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5)
        if not torch.allclose(feature.permute(0, 2, 3, 1), normed, atol=1e-4):
            return False
    return True
