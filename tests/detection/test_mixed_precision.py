"""Backbone and neck run in bfloat16, everything that computes with boxes in float32."""

import importlib

import pytest
import torch

from polynext_mm.compat.torch_features import autocast_dtype
from tests.detection.detectors import batch, build, load, losses
from tests.helpers.tiny import TINY_ARCH

# a detector in two stages, and one in one
NAMES = ['mask_rcnn_cpolynext_t_coco_1x', 'retinanet_cpolynext_t_coco_1x']


def built(name, weight_init='imagenet', **optim_wrapper):
    cfg = load(name)
    cfg.model.backbone.update(drop_path_rate=0.0, weight_init=weight_init)
    cfg.optim_wrapper.update(optim_wrapper)
    return build(cfg)


def built_tiny(name, **optim_wrapper):
    cfg = load(name)
    cfg.model.backbone.update(arch=TINY_ARCH, drop_path_rate=0.0)
    cfg.model.neck.in_channels = [TINY_ARCH['widths'][i] for i in cfg.model.backbone.out_indices]
    cfg.optim_wrapper.update(optim_wrapper)
    return build(cfg)


@pytest.fixture
def seen(monkeypatch):
    """Record the dtypes that box coding, RoI extraction and nms are called with."""
    from mmcv.ops import RoIAlign
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    types = {}

    def spy(owner, attribute, name):
        original = getattr(owner, attribute)

        def spied(*args, **kwargs):
            types.setdefault(name, set()).update(
                arg.dtype
                for arg in args
                if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            )
            types[name].add('autocast' if autocast_dtype('cpu') else 'no autocast')
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, spied)

    spy(DeltaXYWHBBoxCoder, 'encode', 'encode')
    spy(DeltaXYWHBBoxCoder, 'decode', 'decode')
    spy(RoIAlign, 'forward', 'roi_align')
    spy(importlib.import_module('mmcv.ops.nms').NMSop, 'apply', 'nms')
    return types


@pytest.mark.parametrize('name', NAMES)
def test_boxes_are_float32(name, seen):
    model, wrapper = built_tiny(name)
    features = {}
    model.backbone.stages[2].register_forward_hook(
        lambda *_: features.update(autocast=autocast_dtype('cpu') is not None)
    )
    model.neck.lateral_convs[0].register_forward_hook(
        lambda _, args, out: features.update(inside=out.dtype)
    )
    model.neck.register_forward_hook(lambda _, args, out: features.update(after=out[0].dtype))
    loss, _ = losses(model, wrapper, batch())
    assert features == dict(autocast=True, inside=torch.bfloat16, after=torch.bfloat16)
    assert loss.dtype is torch.float32
    expected = {'encode'} if 'retinanet' in name else {'encode', 'decode', 'roi_align', 'nms'}
    assert expected <= set(seen)
    assert all(types == {torch.float32, 'no autocast'} for types in seen.values()), seen


@pytest.mark.parametrize('name', NAMES)
def test_heads_are_those_of_float32(name):
    """With the same features, the losses are exactly those of float32."""
    model, wrapper = built_tiny(name)
    extract, kept = model.extract_feat, []

    def keep_features(images):
        kept.append(extract(images))
        torch.manual_seed(2)  # for the samplers
        return kept[-1]

    model.extract_feat = keep_features
    _, mixed = losses(model, wrapper, batch())
    model.extract_feat = lambda images: (torch.manual_seed(2), kept[0])[1]
    wrapper.cast_dtype = torch.float32
    _, plain = losses(model, wrapper, batch())
    assert kept[0][0].dtype is torch.float32
    assert {key: value.item() for key, value in mixed.items()} == {
        key: value.item() for key, value in plain.items()
    }


def test_losses_are_near_those_of_float32():
    name = 'retinanet_cpolynext_t_coco_1x'  # nothing in its head is random
    _, mixed = losses(*built(name), batch())
    _, plain = losses(*built(name, dtype='float32'), batch())
    for key in plain:
        assert mixed[key].item() == pytest.approx(plain[key].item(), rel=1e-2)
        assert mixed[key].item() != plain[key].item()


def test_the_gradients_reach_the_backbone_through_the_cast():
    """From small weights, with which few branches add their roundings."""
    gradients = []
    for dtype in ('bfloat16', 'float32'):
        model, wrapper = built(
            'retinanet_cpolynext_t_coco_1x', dtype=dtype, weight_init='trunc_normal'
        )
        loss, _ = losses(model, wrapper, batch())
        wrapper.backward(loss)
        gradients.append(model.backbone.stem.weight.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.98


def test_autocast_ends_with_the_call_even_if_it_raises():
    model, wrapper = built_tiny('retinanet_cpolynext_t_coco_1x')
    hooks = len(model.backbone._forward_hooks)
    with pytest.raises(ValueError, match='at least 32x32'), wrapper.optim_context(model):
        model.backbone(torch.zeros(1, 3, 8, 8))
    assert not autocast_dtype('cpu')
    assert len(model.backbone._forward_hooks) == hooks


def test_an_unknown_part_is_named():
    model, wrapper = built_tiny('retinanet_cpolynext_t_coco_1x', modules=['backbone', 'nec'])
    with pytest.raises(ValueError, match="has no 'nec'; its parts are .*neck"):
        losses(model, wrapper, batch())
