"""Mask R-CNN with the peers of PolyNeXt learns and predicts; tests/configs holds its recipe."""

import pytest
import torch

from tests.detection.detectors import batch, build, load, losses
from tests.marks import some_slow


@pytest.mark.heavy
@pytest.mark.parametrize('arch', some_slow(['convformer_s18', 'caformer_s18'], ['convformer_s18']))
def test_a_step_and_a_prediction(arch):
    model, wrapper = build(load(f'mask_rcnn_{arch}_coco_1x'))
    loss, _ = losses(model, wrapper, batch())
    assert loss.isfinite() and loss.dtype is torch.float32
    wrapper.backward(loss)
    # whatever trains takes part in every step: DDP needs no find_unused_parameters
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    before = model.backbone.stem.conv.weight.clone()
    wrapper.step()
    assert not torch.equal(before, model.backbone.stem.conv.weight)

    found = model.eval().val_step(batch())[0].pred_instances
    assert 0 < len(found) <= 20
    assert found.bboxes.isfinite().all() and found.masks.shape == (len(found), 96, 96)
