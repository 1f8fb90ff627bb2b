"""Every COCO config builds, learns and predicts, and the families do not drift apart."""

import functools

import pytest
import torch
from detectors import CONFIGS, batch, build, load, losses
from mmengine.config import Config

from helpers import ROOT, TINY_ARCH, assert_counted_right

RECIPES = {
    'mask_rcnn_{}_coco_1x': 'tsbl',
    'mask_rcnn_{}_coco_3x': 's',
    'retinanet_{}_coco_1x': 'ts',
    'cascade_mask_rcnn_{}_coco_3x': 'sbl',
}


def test_configs_are_all_there():
    expected = [
        recipe.format(f'{family}polynext_{size}')
        for recipe, sizes in RECIPES.items()
        for family in 'ac'
        for size in sizes
    ]
    assert CONFIGS == sorted(expected)


@pytest.mark.parametrize('name', CONFIGS)
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
        family = cfg.model.backbone.arch[0]
        assert cfg.model.backbone.arch in name
        assert cfg.model.backbone.init_cfg.checkpoint == f'polynext://{cfg.model.backbone.arch}'
        assert cfg.model.backbone.pop('grad_clip_norm', None) == (5.0 if family == 'a' else None)
        clip = cfg.optim_wrapper.pop('clip_grad', None)
        assert clip == (dict(max_norm=5.0, norm_type=2) if family == 'a' else None)
        for key in ('arch', 'init_cfg', 'drop_path_rate'):
            cfg.model.backbone.pop(key)
        cfg.model.neck.pop('in_channels')
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


@pytest.mark.parametrize('name', CONFIGS[::5])
def test_parameter_groups(name):
    """Heads have the learning rate of the backbone, and weight decay is as for ADE20K."""
    model, wrapper = build(load(name))
    groups = wrapper.optimizer.param_groups
    assert len({group['lr'] for group in groups}) == 1
    assert {group['weight_decay'] for group in groups} == {0.0, 0.05}
    counted = sum(len(group['params']) for group in groups)
    assert counted == sum(param.requires_grad for param in model.parameters())


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
