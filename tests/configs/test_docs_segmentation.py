"""The examples of docs/segmentation.md, as configs."""

import importlib
import re
import shutil

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from helpers import (
    CONFIG,
    ROOT,
    Config,
    as_arguments,
    build_model,
    mm_folder,
    python,
    tiny_options,
)

BLOCKS = re.findall(
    r'```python\n(.*?)```', (ROOT / 'docs' / 'segmentation.md').read_text(), re.DOTALL
)


def example(mark: str) -> str:
    """Return the one example that contains ``mark``."""
    (found,) = [block for block in BLOCKS if mark in block]
    return found


@pytest.fixture(scope='module')
def roofs(tmp_path_factory):
    """Write tiles with labels 0, 1, 2 and 255 in the example's layout; return their folder."""
    root = tmp_path_factory.mktemp('roofs')
    tiles = sorted((ROOT / 'demo' / 'landcover' / 'images' / 'training').glob('*.jpg'))[:2]
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for tile in tiles:
            shutil.copy(tile, root / 'images' / split)
            labels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 3
            labels[:8] = 255
            Image.fromarray(labels).save(root / 'labels' / split / f'{tile.stem}.png')
    return root


@pytest.fixture(params=[False, True], ids=['keeps zero', 'ignores zero'])
def own_data(request, roofs, tmp_path):
    """Paste the example, with the smallest network; return its path and reduce_zero_label."""
    text = example("type='BaseSegDataset'")
    lines = text.splitlines()
    assert len(lines) <= 25 and text.count('reduce_zero_label') == 1
    for old, new in (
        ('PATH/TO/polynext_mm/configs/upernet_cpolynext_s_ade20k.py', str(CONFIG)),
        ('/data/roofs', str(roofs)),
        ('reduce_zero_label=False', f'reduce_zero_label={request.param}'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / 'my_config.py'
    path.write_text(text)
    return path, request.param


def load_config(tool: str, *arguments) -> Config:
    module = importlib.import_module(f'polynext_mm.commands.{tool}')
    return module.load_config(module.build_parser().parse_args(list(map(str, arguments))))


def labels_in(dataset: dict) -> set[int]:
    """Return the labels in the first sample of a data set."""
    init_default_scope('mmseg')
    sample = DATASETS.build(dataset)[0]['data_samples']
    sample = sample[0] if isinstance(sample, list) else sample  # TTA makes several
    return set(sample.gt_sem_seg.data.unique().tolist())


def test_all_pipelines_load_the_same_labels(own_data):
    path, ignores_zero = own_data
    train = load_config('train', path)
    test = load_config('test', path, 'some.pth')
    with_tta = load_config('test', path, 'some.pth', '--tta')
    assert with_tta.test_dataloader.dataset.pipeline == train.tta_pipeline
    found = [
        labels_in(dataset)
        for dataset in (
            train.train_dataloader.dataset,
            train.val_dataloader.dataset,
            test.test_dataloader.dataset,
            with_tta.test_dataloader.dataset,
        )
    ]
    assert found[1] == found[2] == found[3] == ({0, 1, 255} if ignores_zero else {0, 1, 2, 255})
    assert found[0] <= found[1] | {255} and {0, 1} <= found[0]


@pytest.mark.parametrize('own_data', [False], indirect=True)
def test_tta_evaluates_the_example(own_data, tmp_path):
    path, _ = own_data
    cfg = Config.fromfile(path)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
    cfg.model.backbone.init_cfg = None
    options = {
        key: value
        for key, value in tiny_options('unused').items()
        if key.startswith(('model.', 'test_dataloader.num', 'test_dataloader.pers'))
    }
    cfg.merge_from_dict(options)
    torch.save(dict(meta={}, state_dict=build_model(cfg).state_dict()), tmp_path / 'model.pth')
    printed = python(
        ROOT / 'tools' / 'test.py',
        path,
        'model.pth',
        '--tta',
        *as_arguments(options),
        cwd=tmp_path,
    )
    assert re.search(r'aAcc: [\d.]+  mIoU: [\d.]+', printed)


def test_the_example_in_mmsegs_configs(tmp_path):
    configs = tmp_path / 'configs'
    for part in ('_base_', 'pspnet'):
        shutil.copytree(mm_folder('mmseg') / 'configs' / part, configs / part)
    path = configs / 'pspnet' / 'mine.py'
    path.write_text(example('pspnet_r50'))
    cfg = Config.fromfile(path)
    assert cfg.default_hooks.checkpoint_guard.type == 'CheckpointGuardHook'
    assert cfg.default_hooks.machine.type == 'MachineHook'
    assert 'logger' in cfg.default_hooks
    model = build_model(cfg).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape[1] == 19


def test_the_example_of_fine_tuning():
    text = example('reset_mismatched_heads').replace('PATH/TO/polynext_mm', str(ROOT))
    cfg = Config.fromstring(text, '.py')
    guard = dict(type='CheckpointGuardHook', reset_mismatched_heads=True)
    assert cfg.custom_hooks == [guard, *Config.fromfile(CONFIG).custom_hooks[1:]]
    assert cfg.load_from == 'polynext://uper_cpolynexts'


def test_the_normalization_is_that_of_the_configs():
    shown = Config.fromstring(example('bgr_to_rgb'), '.py').data_preprocessor
    used = Config.fromfile(CONFIG).model.data_preprocessor
    assert shown.items() <= used.items()
