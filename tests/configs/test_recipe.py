"""The ADE20K configs do what the authors' training code did, run beside them.

tests/data has what the release's own code gave: mmseg 0.13 as the authors changed it, with their
config of UperNet. See tests/data/README.md.
"""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import PixelData
from PIL import Image
from torch import nn

from polynext_mm.weights import load
from polynext_mm.weights.names import authors_to_ours
from tests.golden import DATA, Recipe, generator, normal
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT

NETWORKS = pytest.mark.parametrize('network', ['cpolynext_s', 'apolynext_s'])
LR, DECAY = 1e-4, 0.05
# mmseg 1 adds this to the number of pixels that it divides a loss by, and mmseg 0.x does not
EPSILON = torch.finfo(torch.float32).eps


def config(network: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'upernet_{network}_ade20k.py')


def enlarged(array: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """Make squares of 8x8 of every value, as bytes."""
    return array.repeat(8, axes[0]).repeat(8, axes[1]).astype(np.uint8)


def segmentor(cfg: Config, recipe: Recipe, folder) -> nn.Module:
    """Build the config's model without randomness, with the weights of an authors' file."""
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.dropout_ratio = 0
        head.loss_decode.loss_weight *= recipe.loss_weight
    model = revert_sync_batchnorm(build_model(cfg))
    torch.save(dict(state_dict=recipe.state_dict()), folder / 'segmentor.pth')
    load(model, folder / 'segmentor.pth')
    return model


def by_authors_names(model: nn.Module, values: dict) -> dict:
    theirs = {
        f'backbone.{ours}': f'backbone.{name}'
        for name, ours in authors_to_ours(model.backbone.arch).items()
    }
    return {theirs.get(name, name): value for name, value in values.items()}


def build_schedulers(cfg: Config, optimizer: torch.optim.Optimizer) -> list:
    return [
        PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
        for settings in cfg.param_scheduler
    ]


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    """Five pictures of several sizes, in ADE20K's layout."""
    root = tmp_path_factory.mktemp('ade20k')
    for kind in ('images', 'annotations'):
        (root / kind / 'training').mkdir(parents=True)
    for i, (height, width) in enumerate(np.load(DATA / 'recipe_augmentation.npz')['sizes']):
        shape = (height // 8, width // 8)
        picture = enlarged(generator(f'picture{i}').integers(0, 256, (*shape, 3)), axes=(0, 1))
        labels = enlarged(generator(f'annotation{i}').integers(0, 151, shape), axes=(0, 1))
        # drawn as BGR, and lossless whatever the name says
        Image.fromarray(picture[..., ::-1]).save(root / 'images' / 'training' / f'{i}.jpg', 'PNG')
        Image.fromarray(labels).save(root / 'annotations' / 'training' / f'{i}.png')
    return root


@NETWORKS
def test_augmentation_is_equal_to_the_bit(network, ade20k):
    cfg, expected = config(network), np.load(DATA / 'recipe_augmentation.npz')
    init_default_scope('mmseg')
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=str(ade20k)))
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    for i in range(5):
        for seed in range(6):
            np.random.seed(seed)
            batch = preprocessor(pseudo_collate([dataset[i]]), training=True)
            index = generator(f'index{i}.{seed}').integers(0, 512 * 512, 128)
            pixels = batch['inputs'][0].flatten(1)[:, index].numpy()
            labels = batch['data_samples'][0].gt_sem_seg.data.flatten()[index].numpy()
            assert np.array_equal(pixels, expected['images'][i, seed])
            assert np.array_equal(labels, expected['labels'][i, seed])


@NETWORKS
def test_weight_decay_and_learning_rate_of_every_parameter(network):
    cfg = config(network)
    cfg.model.backbone.init_cfg = None
    model = build_model(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(param): name for name, param in model.named_parameters()}
    groups = {
        names[id(param)]: [group['weight_decay'] / DECAY, group['lr'] / LR]
        for group in optimizer.param_groups
        for param in group['params']
    }
    assert by_authors_names(model, groups) == Recipe(network).groups


@NETWORKS
def test_learning_rates_from_the_first_to_the_last_iteration(network):
    cfg, expected = config(network), Recipe(network).rates
    params = [dict(params=[nn.Parameter(torch.zeros(1))], lr=rate * LR) for rate in (1, 10)]
    optimizer = torch.optim.SGD(params)
    schedulers = build_schedulers(cfg, optimizer)
    assert max(expected) == cfg.train_cfg.max_iters - 1
    for iteration in range(cfg.train_cfg.max_iters):
        if iteration in expected:
            rates = [group['lr'] for group in optimizer.param_groups]
            assert rates == pytest.approx(expected[iteration], rel=1e-10, abs=0), iteration
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.slow
@NETWORKS
def test_evaluation_by_sliding_windows(network, tmp_path):
    from mmseg.structures import SegDataSample

    recipe = Recipe(network)
    model = segmentor(config(network), recipe, tmp_path).eval()
    sample = SegDataSample(
        metainfo=dict(img_shape=(512, 640), pad_shape=(512, 640), ori_shape=(400, 500))
    )
    with torch.no_grad():
        (result,) = model.predict(normal('image', (1, 3, 512, 640)), [sample])
    confidences, classes = result.seg_logits.data.softmax(0).flatten(1)[:, recipe.pixels].max(0)
    assert torch.equal(classes, recipe.classes)
    assert torch.equal(result.pred_sem_seg.data.flatten()[recipe.pixels], recipe.classes)
    torch.testing.assert_close(confidences.double(), recipe.confidences.double(), rtol=0, atol=2e-7)


@pytest.mark.slow
@NETWORKS
def test_five_steps_of_training(network, tmp_path):
    """In float64. The total gradient is clipped, and that at every cell, where the recipe does."""
    from mmseg.structures import SegDataSample

    recipe, cfg = Recipe(network), config(network)
    model = segmentor(cfg, recipe, tmp_path).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cfg.optim_wrapper.dtype = 'float32'  # no autocast
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedulers = build_schedulers(cfg, wrapper.optimizer)
    for scheduler in schedulers:
        for _ in range(2000):
            scheduler.step()
    for i, expected in enumerate(recipe.losses):
        images = normal(f'batch{i}', (2, 3, 96, 128)).double()
        labels = enlarged(generator(f'label{i}').integers(0, 150, (2, 1, 12, 16)), axes=(2, 3))
        labels[:, :, :4] = 255
        labels = torch.from_numpy(labels).long()
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        with wrapper.optim_context(model):
            losses = model.loss(images, samples)
            loss, logged = model.parse_losses(losses)
        wrapper.update_params(loss)
        for scheduler in schedulers:
            scheduler.step()
        rounding = 1 + EPSILON / labels.numel()
        for name, value in expected.items():
            found = logged[name.replace('loss_seg', 'loss_ce')].item()
            assert found * rounding == pytest.approx(value, rel=1e-12, abs=0), (i, name)
    moved = by_authors_names(
        model,
        {
            key: (value - before[key]).norm().item()
            for key, value in model.state_dict().items()
            if value.is_floating_point()
        },
    )
    assert moved.keys() == recipe.moved.keys()
    # the absolute tolerance is for two biases that batch norms subtract again
    for name, norm in recipe.moved.items():
        assert moved[name] == pytest.approx(norm, rel=2e-9, abs=1e-12), name
