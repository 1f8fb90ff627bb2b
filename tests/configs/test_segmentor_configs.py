"""Heads besides UperNet, data sets besides ADE20K: recipes, a step, a prediction, the data."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from polynext_mm.analysis import count_config
from polynext_mm.engine.launch import DatasetNotFoundError, require_dataset
from tests.configs.segmentors import assert_a_step_trains_everything, assert_it_predicts
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.marks import some_slow


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says: the learning rate is the backbone's, the clip the recipe's."""

    head: str
    classes: int
    lr: float
    head_lr: float
    decay: float
    no_decay: str = 'released'
    clip: float | None = None
    runs_on_meta: bool = True


RECIPES = {
    'semantic_fpn_{}_ade20k_80k': Recipe('FPNHead', 150, 2e-4, 2e-4, 1e-4),
    'segformer_{}_ade20k': Recipe('SegformerHead', 150, 6e-5, 6e-4, 0.01, 'paper'),
    'mask2former_{}_ade20k': Recipe(
        'Mask2FormerHead', 150, 1e-5, 1e-4, 0.05, 'paper', clip=0.01, runs_on_meta=False
    ),
    'upernet_{}_cityscapes': Recipe('UPerHead', 19, 6e-5, 6e-5, 0.05),
    'upernet_{}_voc12aug_40k': Recipe('UPerHead', 21, 1e-4, 1e-3, 0.05),
    'upernet_{}_pascal_context_80k': Recipe('UPerHead', 59, 6e-5, 6e-4, 0.01, 'paper'),
}
FAMILIES = ('cpolynext_s', 'apolynext_s')
EACH = pytest.mark.parametrize('recipe', RECIPES)
DATA = {recipe: RECIPES[recipe].classes for recipe in RECIPES if 'upernet' in recipe}


def config(recipe: str, arch: str = FAMILIES[0]) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{recipe.format(arch)}.py')


@EACH
def test_families_differ_in_the_backbone_alone(recipe):
    """Where a recipe has no clip of its own, A has the authors'."""
    found = []
    for arch in FAMILIES:
        cfg = config(recipe, arch)
        backbone = cfg.model.backbone
        assert backbone.pop('arch') == arch
        assert backbone.pop('init_cfg').checkpoint == f'polynext://{arch}'
        is_a = arch.startswith('a')
        assert backbone.pop('grad_clip_norm', None) == (5.0 if is_a else None)
        clip = RECIPES[recipe].clip or (5.0 if is_a else None)
        assert cfg.optim_wrapper.pop('clip_grad', None) == (
            clip and dict(max_norm=clip, norm_type=2)
        )
        found.append(cfg.to_dict())
    assert found[0] == found[1]


@EACH
def test_parameter_groups(recipe):
    cfg, said = config(recipe), RECIPES[recipe]
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        model = build_model(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    settings = {
        id(param): (group['lr'], group['weight_decay'])
        for group in groups
        for param in group['params']
    }
    embeddings = 0
    for name, param in model.named_parameters():
        lr, decay = settings[id(param)]
        assert lr == pytest.approx(said.lr if name.startswith('backbone.') else said.head_lr), name
        if any(part in name for part in ('query_', 'level_e')):
            embeddings += 1
            assert decay == 0, name
        elif name.endswith(('.bn.weight', '.norm.weight')):
            assert decay == (0 if said.no_decay == 'paper' else said.decay), name
        elif param.ndim > 1:
            assert decay == said.decay, name
    # two of the queries, one of the levels in the decoder and one in the pixel decoder
    assert embeddings == (4 if said.head == 'Mask2FormerHead' else 0)


# A kind of head each; the other recipes have other data and schedules.
HEADS = list({said.head: recipe for recipe, said in RECIPES.items()}.values())


@pytest.mark.heavy
@pytest.mark.parametrize('arch', some_slow(FAMILIES, FAMILIES[1:]))
@pytest.mark.parametrize('recipe', some_slow(RECIPES, RECIPES.keys() - set(HEADS)))
def test_a_step_and_a_prediction(recipe, arch):
    cfg, classes = config(recipe, arch), RECIPES[recipe].classes
    # deformable attention looks at places that depend on nothing before its first step
    steps = 2 if 'mask2former' in recipe else 1
    model = assert_a_step_trains_everything(cfg, classes, steps=steps)
    assert_it_predicts(model, classes)


@EACH
def test_operations_are_counted(recipe):
    """Mask2Former masks its attention by what it predicts: that needs values."""
    cfg = config(recipe)
    cfg.model.backbone.init_cfg = None
    if not RECIPES[recipe].runs_on_meta:
        with pytest.raises(RuntimeError, match='does not run on the meta device.*to cpu'):
            count_config(cfg, (64, 64))
    cost = count_config(cfg, (64, 64), 'meta' if RECIPES[recipe].runs_on_meta else 'cpu')
    parts = [
        cost.parts[part].macs for part in ('backbone', 'neck', 'decode_head') if part in cost.parts
    ]
    if (
        'mask2former' in recipe
    ):  # what it predicts of classes and masks, multiplied outside the head
        parts.append(100 * 150 * 64 * 64)
    assert min(parts) > 0 and sum(parts) == cost.macs


# The data sets


def write_sample(root, recipe: str) -> None:
    """Write an image with labels in the layout that a config expects below its data_root."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    labels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % (DATA[recipe] + 1)
    labels[0] = 255

    def put(image_path: str, label_path: str) -> None:
        for path in (image_path, label_path):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / image_path)
        Image.fromarray(labels).save(root / label_path)

    if 'cityscapes' in recipe:
        for split in ('train', 'val'):
            put(
                f'leftImg8bit/{split}/bonn/bonn_0_leftImg8bit.png',
                f'gtFine/{split}/bonn/bonn_0_gtFine_labelTrainIds.png',
            )
        return
    context = 'context' in recipe
    lists = root / 'ImageSets' / ('SegmentationContext' if context else 'Segmentation')
    lists.mkdir(parents=True)
    for split in ('train', 'val') if context else ('train', 'val', 'aug'):
        kind = dict(aug='SegmentationClassAug').get(split, 'SegmentationClass')
        (lists / f'{split}.txt').write_text(f'{split}_0\n')
        put(
            f'JPEGImages/{split}_0.jpg',
            f'{"SegmentationClassContext" if context else kind}/{split}_0.png',
        )


def moved(recipe: str, root) -> Config:
    cfg = config(recipe)
    for task in ('train', 'val'):
        for dataset in datasets(cfg, task):
            dataset.data_root = str(root)
    return cfg


def datasets(cfg: Config, task: str) -> list:
    dataset = cfg[f'{task}_dataloader'].dataset
    return dataset.get('datasets', [dataset])


@pytest.mark.parametrize('recipe', DATA)
def test_samples_and_labels_of_a_data_set(recipe, tmp_path):
    write_sample(tmp_path, recipe)
    cfg, classes = moved(recipe, tmp_path), DATA[recipe]
    init_default_scope('mmseg')
    for task in ('train', 'val'):
        require_dataset(cfg[f'{task}_dataloader'].dataset)
        dataset = DATASETS.build(cfg[f'{task}_dataloader'].dataset)
        assert len(dataset) == len(datasets(cfg, task))
        assert len(dataset.metainfo['classes']) == classes
        for sample in dataset:
            found = set(sample['data_samples'].gt_sem_seg.data.unique().tolist())
            expected = set(range(classes)) | {255}
            # 0, which is ignored there, and the one after the last, which is a label nowhere else
            expected |= set() if 'context' in recipe else {classes}
            assert found <= expected and len(found) > 10
            height, width = sample['inputs'].shape[-2:]
            if task == 'train':
                assert height <= cfg.model.data_preprocessor['size'][0]
                assert width <= cfg.model.data_preprocessor['size'][1]


@pytest.mark.parametrize(
    ('recipe', 'missing', 'source'),
    [
        ('upernet_{}_cityscapes', 'gtFine/train', 'www.cityscapes-dataset.com'),
        ('upernet_{}_voc12aug_40k', 'ImageSets/Segmentation/aug.txt', 'voc_aug.py'),
        (
            'upernet_{}_pascal_context_80k',
            'ImageSets/SegmentationContext/train.txt',
            'pascal_context.py',
        ),
    ],
)
def test_what_is_missing_of_a_data_set_is_named(recipe, missing, source, tmp_path):
    root = tmp_path / config(recipe).data_root
    write_sample(root, recipe)
    path = root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DatasetNotFoundError) as error:
        require_dataset(moved(recipe, root).train_dataloader.dataset)
    message = str(error.value)
    assert message.startswith(f'there is no {path}\n')
    assert source in message and missing.split('/')[0] in message.split('expected below', 1)[1]
