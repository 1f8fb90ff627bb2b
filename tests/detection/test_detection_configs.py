"""Every COCO config builds, learns and predicts, and the families do not drift apart."""

import functools
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope

from polynext_mm.analysis import count_config
from tests.coco_sample import make_coco
from tests.detection.detectors import CONFIGS, batch, build, load, losses
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.networks import assert_counted_right
from tests.helpers.tiny import TINY_ARCH
from tests.marks import some_slow

RECIPES = {
    'mask_rcnn_{}_coco_1x': 'tsbl',
    'mask_rcnn_{}_coco_3x': 's',
    'retinanet_{}_coco_1x': 'ts',
    'cascade_mask_rcnn_{}_coco_3x': 'sbl',
    'atss_{}_coco_1x': 's',
    'dino_{}_coco_12e': 's',
    'mask2former_{}_coco_50e': 's',
}
CLIPS = {'dino': 0.1, 'mask2former': 0.01}  # of recipes, instead of the authors'


# The configs of a recipe differ in the backbone alone: one of each shows it. The two of Mask R-CNN
# differ in their schedules.
SHOWN = [recipe.format(f'cpolynext_{sizes[0]}') for recipe, sizes in RECIPES.items()]
SHOWN.remove('mask_rcnn_cpolynext_s_coco_3x')
SHOWN[SHOWN.index('retinanet_cpolynext_t_coco_1x')] = 'retinanet_apolynext_t_coco_1x'


@pytest.mark.heavy
@pytest.mark.parametrize('name', some_slow(CONFIGS, set(CONFIGS) - set(SHOWN)))
def test_a_step_and_a_prediction(name):
    model, wrapper = build(load(name))
    loss, log = losses(model, wrapper, batch())
    assert loss.isfinite() and loss.dtype is torch.float32
    wrapper.backward(loss)
    # every parameter has a gradient, so DDP needs no find_unused_parameters
    assert [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and param.grad is None
    ] == []
    before = model.backbone.stem.weight.clone()
    wrapper.step()
    assert not torch.equal(before, model.backbone.stem.weight)

    found = model.eval().val_step(batch())[0].pred_instances
    assert 0 < len(found) <= 20
    assert found.bboxes.isfinite().all() and 0 <= found.bboxes.min() and found.bboxes.max() <= 96
    assert 'mask' not in name or found.masks.shape == (len(found), 96, 96)


@pytest.mark.parametrize('name', CONFIGS)
def test_families_differ_in_the_backbone_alone(name):
    """The A recipe adds the two clips; sizes differ in widths and drop path alone."""

    def common(name):
        cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
        assert cfg.auto_scale_lr.base_batch_size == 16
        family = cfg.model.backbone.arch[0]
        assert cfg.model.backbone.arch in name
        assert cfg.model.backbone.init_cfg.checkpoint == f'polynext://{cfg.model.backbone.arch}'
        assert cfg.model.backbone.pop('grad_clip_norm', None) == (5.0 if family == 'a' else None)
        clip = CLIPS.get(method, 5.0 if family == 'a' else None)
        assert cfg.optim_wrapper.pop('clip_grad', None) == (
            clip and dict(max_norm=clip, norm_type=2)
        )
        for key in ('arch', 'init_cfg', 'drop_path_rate'):
            cfg.model.backbone.pop(key)
        cfg.model.get('neck', cfg.model.get('panoptic_head')).pop('in_channels')
        return cfg.to_dict()

    method, _, rest = name.partition('_apolynext' if '_apoly' in name else '_cpolynext')
    assert common(name) == common(f'{method}_cpolynext_s{rest[2:]}')


@pytest.mark.parametrize(
    'name, lr, warmup, steps, epochs',
    [
        ('mask_rcnn_cpolynext_s_coco_1x', 2e-4, 500, (8, 11), 12),
        ('retinanet_apolynext_t_coco_1x', 1e-4, 500, (8, 11), 12),
        ('mask_rcnn_apolynext_s_coco_3x', 1e-4, 1000, (27, 33), 36),
        ('cascade_mask_rcnn_cpolynext_b_coco_3x', 1e-4, 1000, (27, 33), 36),
        ('atss_cpolynext_s_coco_1x', 1e-4, 500, (8, 11), 12),
    ],
)
def test_learning_rates(name, lr, warmup, steps, epochs):
    from mmengine.registry import PARAM_SCHEDULERS

    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.optim_wrapper.optimizer.lr == lr and cfg.optim_wrapper.optimizer.weight_decay == 0.05
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    linear, multi_step = (
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    )

    def rate():
        return optimizer.param_groups[0]['lr']

    curve = [rate()]
    for _ in range(warmup):
        linear.step()
        curve.append(rate())
    assert curve[0] == pytest.approx(lr * 0.001)
    assert curve[warmup // 2] == pytest.approx(lr / 2, rel=0.01)
    assert curve[warmup - 1] == pytest.approx(lr) and curve[-1] == pytest.approx(lr)
    for epoch in range(epochs):
        assert rate() == pytest.approx(lr * 0.1 ** sum(epoch >= step for step in steps))
        multi_step.step()


@pytest.mark.parametrize(
    ('name', 'lrs', 'decay'),
    [
        # weight decay is as for ADE20K, and heads have the learning rate of the backbone
        ('mask_rcnn_cpolynext_t_coco_1x', (2e-4, 2e-4), 0.05),
        ('cascade_mask_rcnn_apolynext_s_coco_3x', (1e-4, 1e-4), 0.05),
        ('atss_cpolynext_s_coco_1x', (1e-4, 1e-4), 0.05),
        ('dino_cpolynext_s_coco_12e', (1e-5, 1e-4), 1e-4),
        ('mask2former_cpolynext_s_coco_50e', (1e-5, 1e-4), 0.05),
    ],
)
def test_parameter_groups(name, lrs, decay):
    """Mask2Former's norms and embeddings do not decay."""
    cfg = load(name)
    with torch.device('meta'):
        model = build_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    settings = {
        id(param): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    assert len(settings) == sum(param.requires_grad for param in model.parameters())
    exempt = (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.Embedding)
    for module_name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            is_backbone = module_name.startswith('backbone')
            lr, found = settings[id(param)]
            assert lr == pytest.approx(lrs[0 if is_backbone else 1]), module_name
            if not is_backbone:
                spared = 'mask2former' in name and isinstance(module, exempt)
                assert found == (0.0 if spared else decay), module_name


@pytest.mark.parametrize('method', ['atss', 'dino', 'mask2former'])
def test_operations_are_counted(method):
    """Queries of DINO are chosen by their scores, and Mask2Former's masks attend: values."""
    (name,) = [name for name in CONFIGS if name.startswith(f'{method}_cpolynext_s')]
    cfg = load(name)
    if method == 'atss':
        cost = count_config(cfg, (96, 96))
    else:
        with pytest.raises(RuntimeError, match='does not run on the meta device.*to cpu'):
            count_config(cfg, (96, 96))
        cost = count_config(cfg, (96, 96), 'cpu')
    assert 0 < cost.parts['backbone'].macs < cost.macs


@pytest.mark.parametrize('name', ['retinanet_cpolynext_t_coco_1x', 'mask_rcnn_cpolynext_t_coco_1x'])
def test_operations_and_parameters_are_counted_right(name):
    """As in mmdet's get_flops, the detector gets a data sample along with the image."""
    cfg = load(name)
    cfg.model.backbone.arch = TINY_ARCH
    cfg.model.neck.in_channels = [TINY_ARCH['widths'][i] for i in cfg.model.backbone.out_indices]
    model, _ = build(cfg)
    data = model.eval().data_preprocessor(batch())
    model.forward = functools.partial(model.forward, data_samples=data['data_samples'])
    assert_counted_right(model, data['inputs'])


@pytest.mark.parametrize(
    ('name', 'sides', 'has_masks'),
    [
        ('atss_cpolynext_s_coco_1x', (800, 800), False),
        ('dino_cpolynext_s_coco_12e', (480, 800), False),
        ('mask2former_cpolynext_s_coco_50e', (102, 1024), True),
    ],
)
def test_training_samples(name, sides, has_masks, tmp_path):
    """Sizes of square images, with boxes of what is in them; images without objects are DINO's."""
    from mmdet.datasets import CocoDataset

    root = make_coco(tmp_path / 'coco', CocoDataset.METAINFO['classes'], train=2, val=0)
    path = root / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] == 1]
    path.write_text(json.dumps(content))
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.train_dataloader.dataset.data_root = str(root)
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == (2 if 'dino' in name else 1)
    torch.manual_seed(0)
    for sample in (dataset[0] for _ in range(3)):
        height, width = sample['inputs'].shape[-2:]
        assert sides[0] <= min(height, width) and max(height, width) <= max(sides[1], 1333)
        assert 'mask2former' not in name or max(height, width) <= 1024
        found = sample['data_samples'].gt_instances
        assert hasattr(found, 'masks') == has_masks
        assert (found.bboxes.tensor if hasattr(found.bboxes, 'tensor') else found.bboxes).ndim == 2
