"""Segmentors of configs at a small size: a step of training and a prediction."""

from unittest import mock

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from torch import nn

from polynext_mm.nn import batch_norm
from tests.helpers.configs import build_model


def batch(size: int, num_classes: int) -> dict:
    """Return two images of four classes in stripes, as mmseg's data loaders do."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 1, num_classes // 2, num_classes - 1])
    labels = classes.repeat_interleave(size // 4).expand(1, size, size)
    shape = (size, size)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=labels),
        metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape),
    )
    return dict(
        inputs=[
            torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
            for _ in range(2)
        ],
        data_samples=[sample.clone() for _ in range(2)],
    )


def small_model(cfg: Config, size: int) -> nn.Module:
    """Build a segmentor for crops of this size, with no weights fetched and no paths dropped.

    A path dropped for the whole batch would learn nothing.
    """
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
    cfg.model.data_preprocessor['size'] = (size, size)
    cfg.model.test_cfg = dict(mode='whole')
    torch.manual_seed(0)
    return revert_sync_batchnorm(build_model(cfg))


def assert_a_step_trains_everything(
    cfg: Config, num_classes: int, size: int = 64, steps: int = 1
) -> nn.Module:
    """Step with the config's optimizer, check that all parameters moved, and return the model."""
    model = small_model(cfg, size).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for _ in range(steps):
        losses = model.train_step(batch(size, num_classes), wrapper)
    assert losses['loss'].isfinite()
    assert any(name.startswith('decode.') for name in losses)
    assert 'auxiliary_head' not in cfg.model or 'aux.loss_ce' in losses
    for name, param in model.named_parameters():
        assert param.isfinite().all(), name
        assert not torch.equal(param, before[name]), name
    return model


@torch.no_grad()
def take_statistics(model: nn.Module, num_classes: int, size: int = 64) -> None:
    """Make the running statistics of a fully polynomial backbone those of the batch.

    After one step nine tenths of them are what they began with, which describes no image.
    """
    images = model.data_preprocessor(batch(size, num_classes))['inputs']
    with mock.patch.object(batch_norm, 'MOMENTUM', 1.0):
        model.train().backbone(images)


def assert_it_predicts(model: nn.Module, num_classes: int, size: int = 64) -> None:
    """Check that a segmentor gives every pixel a class, by numbers that are finite."""
    found = model.eval().val_step(batch(size, num_classes))
    for result in found:
        assert result.seg_logits.data.shape == (num_classes, size, size)
        assert result.seg_logits.data.isfinite().all()
        classes = result.pred_sem_seg.data
        assert classes.shape == (1, size, size)
        assert 0 <= classes.min() and classes.max() < num_classes
