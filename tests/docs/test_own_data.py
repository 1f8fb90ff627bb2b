"""The two configs of docs/own_data.md: read, and trained and evaluated on data made here."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from polynext_mm.datasets import DataError, check_loading
from polynext_mm.datasets.own import OwnSegDataset
from polynext_mm.engine.checks.config import check_config
from polynext_mm.engine.checks.normalization import find_mismatch
from tests.coco_sample import SHAPES, make_coco
from tests.docs.pages import example, replaced
from tests.helpers.configs import build_model
from tests.helpers.networks import build
from tests.helpers.programs import call_tool
from tests.helpers.tiny import TINY_ARCH
from tests.segmentation_sample import CLASSES, image_path, make_segmentation, write_label

PAGE = 'docs/own_data.md'
SEGMENTATION, DETECTION = (
    example(PAGE, f"config_file('_base_/own_{task}')") for task in ('segmentation', 'detection')
)


@pytest.mark.parametrize('text', [SEGMENTATION, DETECTION], ids=['segmentation', 'detection'])
def test_it_is_a_config_as_pasted(text, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    check_config(cfg)
    cfg.model.backbone.init_cfg = None
    assert find_mismatch(build_model(cfg)) is None
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.metainfo.classes == cfg.classes
    assert cfg.test_evaluator == cfg.val_evaluator


def pasted(text: str, folder: Path, *pairs: tuple[str, object]) -> Path:
    """Write a config of the page with the smallest network, small images and no processes."""
    torch.manual_seed(0)
    torch.save(build(out_norm=False).state_dict(), folder / 'tiny.pt')
    path = folder / 'mine.py'
    path.write_text(
        replaced(
            text,
            ("f'polynext://{arch}'", repr(str(folder / 'tiny.pt'))),
            ("'cpolynext_s'", TINY_ARCH),
            ('num_workers=4', 'num_workers=0'),
            *pairs,
        )
    )
    return path


@pytest.fixture
def segmentation(tmp_path):
    """Write the config, and data with an id that is no class in every label; return the config."""
    root = make_segmentation(tmp_path / 'roofs')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 3)):
        for index in range(count):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)  # TTA shrinks by .75
            Image.fromarray(pixels).save(image_path(root, split, index))
            ids = rng.integers(0, 3, (64, 80))
            ids[:5], ids[5:10] = 11, 255
            write_label(root, split, index, ids)
    return pasted(
        SEGMENTATION,
        tmp_path,
        ('/data/roofs', root),
        ('ignored_ids=[]', 'ignored_ids=[11]'),
        ('crop_size = (512, 512)', 'crop_size = (64, 64)'),
        ('batch_size = 8', 'batch_size = 2'),
        ('max_iters = 20000', 'max_iters = 2'),
    )


@pytest.fixture
def detection(tmp_path):
    """Write the config and data; return the config."""
    root = make_coco(tmp_path / 'cells', SHAPES)
    return pasted(
        DETECTION,
        tmp_path,
        ('/data/cells/', f'{root}/'),
        ("('platelets', 'red', 'white')", SHAPES),
        ('annotations/train.json', 'annotations/instances_train2017.json'),
        ('annotations/val.json', 'annotations/instances_val2017.json'),
        ('images/train/', 'train2017/'),
        ('images/val/', 'val2017/'),
        ('(1333, 800)', (128, 96)),
        ('max_epochs = 24', 'max_epochs = 1'),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'checkpoint', 'metric', 'options'),
    [
        ('segmentation', 'iter_2.pth', r'mIoU: +[\d.]+', ()),
        # no score is high after two steps
        (
            'detection',
            'epoch_1.pth',
            r'coco/bbox_mAP: +-?[\d.]+',
            ('--cfg-options', 'model.test_cfg.score_thr=0.0'),
        ),
    ],
)
def test_it_trains_and_evaluates(
    task, checkpoint, metric, options, request, tmp_path, monkeypatch, capfd
):
    path = request.getfixturevalue(task)
    monkeypatch.chdir(tmp_path)
    assert call_tool('check_dataset', path) is None
    assert call_tool('train', path, *options) is None
    printed = capfd.readouterr()
    assert 'tiny.pt' in printed.out + printed.err  # the weights of init_cfg
    assert re.search(metric, printed.out + printed.err)
    for more in ((), ('--tta',)):
        found = call_tool(
            'test', path, tmp_path / 'work_dirs' / 'mine' / checkpoint, *more, *options
        )
        assert found is None
        printed = capfd.readouterr()
        assert re.search(metric, printed.out + printed.err)


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_ignored_ids_are_255_in_every_pipeline(segmentation, reduce_zero_label):
    cfg = Config.fromfile(segmentation)
    init_default_scope('mmseg')
    for dataset, pipeline in (
        (cfg.train_dataloader.dataset, cfg.test_pipeline),
        (cfg.val_dataloader.dataset, cfg.test_pipeline),
        (cfg.test_dataloader.dataset, cfg.tta_pipeline),
    ):
        settings = dict(dataset, pipeline=pipeline, reduce_zero_label=reduce_zero_label)
        sample = DATASETS.build(settings)[0]['data_samples']
        sample = sample[0] if isinstance(sample, list) else sample  # TTA makes several
        found = set(sample.gt_sem_seg.data.unique().tolist())
        assert found == ({0, 1, 255} if reduce_zero_label else {0, 1, 2, 255})


@pytest.mark.parametrize('ids', [[2], [-1], [256], ['11']])
def test_ids_that_cannot_be_ignored_are_refused(ids, tmp_path):
    with pytest.raises(DataError, match='the ids of the 4 classes are 0 to 3'):
        OwnSegDataset(ids, metainfo=dict(classes=CLASSES), lazy_init=True)


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (dict(label_map={0: 0, 255: 4}), '4 is no class, 0 to 3, nor 255 for ignored'),
        (dict(label_map={0: 0, 256: 1}), '256 is no id, a number from 0 to 255'),
        (dict(label_map={'0': 0}), "'0' is no id"),
        (dict(label_map={1: 0}, reduce_zero_label=True), 'set reduce_zero_label=False, and 0: 255'),
        (dict(label_map={7: 0}, ignored_ids=[7]), 'ignored_ids=.7.: 7 must be .* and no class'),
    ],
)
def test_a_label_map_that_cannot_be_is_refused(options, told):
    with pytest.raises(DataError, match=told):
        OwnSegDataset(metainfo=dict(classes=CLASSES), lazy_init=True, **options)


def test_an_id_that_label_map_does_not_name_is_an_error(segmentation):
    """Also one that is the number of a class: 1 here."""
    cfg = Config.fromfile(segmentation)
    init_default_scope('mmseg')
    settings = dict(cfg.train_dataloader.dataset, pipeline=cfg.test_pipeline)
    settings.update(ignored_ids=[11], label_map={0: 2, 2: 0})
    dataset = DATASETS.build(settings)
    check_loading(dataset)
    with pytest.raises(DataError, match='has the ids 1, which label_map does not name'):
        dataset[0]
    dataset = DATASETS.build({**settings, 'label_map': {0: 2, 1: 1, 2: 0}})
    check_loading(dataset)
    ids = np.asarray(Image.open(dataset.get_data_info(0)['seg_map_path']))
    expected = np.select([ids == 0, ids == 1, ids == 2], [2, 1, 0], 255)
    assert (dataset[0]['data_samples'].gt_sem_seg.data[0].numpy() == expected).all()


def test_a_label_map_is_the_same_once_written_and_read(segmentation, tmp_path):
    cfg = Config.fromfile(segmentation)
    cfg.train_dataloader.dataset.label_map = {0: 0, 255: 1}
    cfg.dump(tmp_path / 'written.py')
    read = Config.fromfile(tmp_path / 'written.py').train_dataloader.dataset.label_map
    assert dict(read) == {0: 0, 255: 1}


def test_fine_tuning_resets_heads_of_other_classes(segmentation):
    path = segmentation.with_name('finetuned.py')
    path.write_text(
        replaced(example(PAGE, 'reset_mismatched_heads'), ('my_roofs.py', segmentation.name))
    )
    cfg, before = Config.fromfile(path), Config.fromfile(segmentation)
    guard = dict(type='CheckpointGuardHook', reset_mismatched_heads=True)
    assert cfg.custom_hooks == [guard, *before.custom_hooks[1:]]
    assert cfg.load_from == 'polynext://uper_cpolynexts'
