"""The tables of docs/other_configs.md: mm's own configs with a PolyNeXt train by these settings."""

import ast
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from polynext_mm.engine.checks.config import check_config
from polynext_mm.engine.checks.normalization import find_mismatch
from tests.configs.segmentors import batch as segmentation_batch
from tests.detection.detectors import batch as detection_batch
from tests.docs.pages import example
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT, mm_folder

PAGE = ROOT / 'docs' / 'other_configs.md'
METHODS = {
    'mmseg': (
        'SegFormer SegNeXt UPerNet PSPNet DeepLabV3+ Semantic_FPN OCRNet Mask2Former'.split()
    ),
    'mmdet': 'Faster_R-CNN FCOS ATSS DETR Deformable_DETR DINO SOLOv2 RTMDet YOLOX'.split(),
}
# Side of the images: DINO takes its 900 queries from positions.
SIZES = {'DINO': 256}
# Those whose data has masks
WITH_MASKS = ('SOLOv2',)


def rows() -> dict[str, tuple[str, list[str]]]:
    """Return the package and the cells of every method of the page."""
    found, package = {}, ''
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith(('| mmseg |', '| mmdet |')):
            package = cells[0]
        elif line.startswith('| ') and package:
            found[cells[0].replace(' ', '_')] = (package, cells[1:])
        elif not line.startswith('|'):
            package = ''
    return found


ROWS = rows()


def test_every_method_is_in_the_table():
    for package, methods in METHODS.items():
        assert [name for name, row in ROWS.items() if row[0] == package] == methods


def config(method: str) -> tuple[Config, str]:
    """Return mm's config with the page's lines, and what the page says of its normalization."""
    package, (name, out_indices, settings, normalization) = ROWS[method]
    (path,) = (mm_folder(package) / 'configs').rglob(f'{name.strip("`")}.py')
    cfg = Config.fromfile(path)
    text = example('docs/other_configs.md', 'modules=')
    lines = Config.fromstring(re.sub('_base_ = .*', '', text), '.py')
    backbone = dict(lines.model.backbone, out_indices=ast.literal_eval(out_indices.strip('`')))
    del backbone['init_cfg']
    cfg.merge_from_dict(dict(model=dict(backbone=backbone), optim_wrapper=lines.optim_wrapper))
    for setting in re.findall(r'`([^`]+)`', settings):
        key, value = setting.split('=', 1)
        cfg.merge_from_dict({f'model.{key}': ast.literal_eval(value)})
    return cfg, normalization


@pytest.mark.slow
@pytest.mark.parametrize('method', ROWS)
def test_a_step_trains_the_whole_backbone(method):
    cfg, normalization = config(method)
    check_config(cfg)
    if normalization == 'to be set':
        assert find_mismatch(build_model(cfg))
        preprocessor = Config.fromstring(
            example('docs/other_configs.md', 'data_preprocessor=dict'), '.py'
        )
        cfg.merge_from_dict(dict(model=preprocessor.model))
    cfg.model.data_preprocessor.pop('batch_augments', None)  # to the sizes of their trainings
    size = SIZES.get(method, 128)
    if ROWS[method][0] == 'mmseg':
        cfg.model.data_preprocessor.size = (size, size)
        num_classes = 150
        batch = segmentation_batch(size, num_classes)
    else:
        batch = detection_batch(size, images=2)
        if method not in WITH_MASKS:
            for sample in batch['data_samples']:
                sample.gt_instances.pop('masks', None)  # of all images, it is one sample
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg)).train()
    model.init_weights()  # of DINO and the like, some memory is not even set before
    assert find_mismatch(model) is None
    MessageHub.get_current_instance().update_info('iter', 0)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: param.detach().clone() for name, param in model.backbone.named_parameters()}
    losses = model.train_step(batch, wrapper)
    assert losses['loss'].isfinite()
    still = [
        name
        for name, param in model.backbone.named_parameters()
        if torch.equal(param, before[name])
    ]
    assert not still
