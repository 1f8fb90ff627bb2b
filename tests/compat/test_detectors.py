"""mmdet's detectors train and predict on the stand-in."""

import importlib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from polynext_mm.compat import install_mmcv_ops
from tests.helpers.files import ROOT
from tests.helpers.programs import python
from tests.marks import some_slow

mmdet = pytest.importorskip('mmdet')
install_mmcv_ops()

SIZE = 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(name):
    """Build a detector of mmdet's own configs, with a small backbone."""
    from mmengine import Config
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    importlib.import_module('mmdet.models')
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs' / '_base_' / 'models'
    model = Config.fromfile(configs / f'{name}.py').model
    model.backbone.update(depth=18, frozen_stages=-1, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512]
    model.test_cfg.get('rcnn', model.test_cfg).score_thr = 0.0
    return importlib.import_module('mmdet.registry').MODELS.build(model)


def sample():
    """Return what mmdet knows of an image with two objects on it."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
    masks[0, 8:40, 4:44] = 1
    masks[1, 20:60, 30:62] = 1
    return DetDataSample(
        metainfo={
            'img_shape': (SIZE, SIZE),
            'ori_shape': (SIZE, SIZE),
            'pad_shape': (SIZE, SIZE),
            'batch_input_shape': (SIZE, SIZE),
            'scale_factor': (1.0, 1.0),
        },
        gt_instances=InstanceData(
            bboxes=torch.tensor([[4.0, 8, 44, 40], [30, 20, 62, 60]]),
            labels=torch.tensor([1, 3]),
            masks=BitmapMasks(masks, SIZE, SIZE),
        ),
        ignored_instances=InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)
        ),
    )


DETECTORS = ['mask-rcnn_r50_fpn', 'cascade-mask-rcnn_r50_fpn', 'retinanet_r50_fpn']


@pytest.mark.heavy
@pytest.mark.parametrize('name', some_slow(DETECTORS, ['cascade-mask-rcnn_r50_fpn']))
def test_a_detector_trains_and_predicts(name):
    from torchvision.ops import box_iou

    detector, images = build(name), torch.randn(2, 3, SIZE, SIZE)
    losses, _ = detector.parse_losses(detector.loss(images, [sample(), sample()]))
    losses.backward()
    assert losses.isfinite()
    gradients = [parameter.grad for parameter in detector.backbone.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)

    with torch.no_grad():
        (predicted,) = detector.eval().predict(images[:1], [sample()])
    found = predicted.pred_instances
    assert 1 < len(found) <= 100
    assert found.bboxes.min() >= 0 and found.bboxes.max() <= SIZE
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    same = (found.labels[:, None] == found.labels).triu(diagonal=1)
    assert (box_iou(found.bboxes, found.bboxes)[same] <= 0.501).all()
    if 'mask' in name:
        assert found.masks.shape == (len(found), SIZE, SIZE)
        assert found.masks.any()


# The compiled operators, where this environment has them

LOSS = """
import sys
import torch

if 'hidden' in sys.argv:
    sys.modules['mmcv._ext'] = None

import polynext_mm
import mmengine
from tests.compat import test_detectors

is_stand_in = hasattr(sys.modules['mmcv._ext'], 'why_missing')
torch.manual_seed(0)
detector = test_detectors.build('mask-rcnn_r50_fpn')
images, samples = torch.randn(2, 3, 64, 64), [test_detectors.sample(), test_detectors.sample()]
losses, _ = detector.parse_losses(detector.loss(images, samples))
losses.backward()
gradient = sum(p.grad.double().abs().sum() for p in detector.parameters() if p.grad is not None)
print(is_stand_in, losses.item(), gradient.item())
"""


@pytest.mark.heavy
def test_the_compiled_operators_are_used_and_give_the_same_loss():
    """To the last digit, gradients included, for the same random numbers."""
    try:
        metadata.version('mmcv')
    except metadata.PackageNotFoundError:
        pytest.skip('this environment has no compiled mmcv')
    compiled = python('-c', LOSS, PYTHONPATH=str(ROOT)).splitlines()[-1]
    stand_in = python('-c', LOSS, 'hidden', PYTHONPATH=str(ROOT)).splitlines()[-1]
    assert compiled.split()[0] == 'False' and stand_in.split()[0] == 'True'
    assert compiled.split()[1:] == stand_in.split()[1:]
