"""Settings from the command line of tools/train.py and tools/test.py."""

import json

import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS, VISUALIZERS, init_default_scope
from mmengine.visualization import LocalVisBackend

from polynext_mm.commands import train
from tests.helpers.files import ROOT

ADE20K = 'upernet_cpolynext_s_ade20k'
COCO = ('mask_rcnn_cpolynext_s_coco_1x', 'cascade_mask_rcnn_apolynext_l_coco_3x')
DETECTION = 'retinanet_cpolynext_t_coco_1x'


def load_config(config, *options) -> Config:
    """Load a config by its path or name as tools/train.py does, with --cfg-options."""
    path = config if '/' in str(config) else ROOT / 'configs' / f'{config}.py'
    arguments = [str(path), *(['--cfg-options', *options] if options else [])]
    return train.load_config(train.build_parser().parse_args(arguments))


def as_text(cfg: Config) -> str:
    return json.dumps(cfg.to_dict(), default=str)


@pytest.mark.parametrize('name', [ADE20K, *COCO, DETECTION])
@pytest.mark.parametrize('slash', ['', '/'])
def test_data_root_moves_every_path_below_it(name, slash):
    old = load_config(name)
    moved = load_config(name, f'data_root=/elsewhere/data{slash}')
    old_root = old.data_root.rstrip('/')
    assert old_root in ('data/ade/ADEChallengeData2016', 'data/coco')
    assert as_text(old).count(f'"{old_root}') >= 4  # the variable and three data sets
    plain = as_text(moved).replace('/elsewhere/data/', '/elsewhere/data')
    expected = as_text(old).replace(f'{old_root}/', old_root).replace(old_root, '/elsewhere/data')
    assert plain == expected


def test_data_root_moves_the_annotations_of_evaluators():
    moved = load_config(COCO[0], 'data_root=/there')
    for split in ('val', 'test'):
        assert moved[f'{split}_dataloader'].dataset.data_root == '/there'
        annotations = '/there/annotations/instances_val2017.json'
        assert moved[f'{split}_evaluator'].ann_file == annotations
    assert load_config(COCO[0], 'data_root=/there').train_dataloader.dataset.data_root == '/there'


def write_roots(folder, roots) -> str:
    """Write a config without the variable data_root, with a data set below each root."""
    path = folder / 'roots.py'
    loaders = (
        f"{task}_dataloader = dict(dataset=dict(type='BaseSegDataset', data_root={root!r}))\n"
        for task, root in zip(('train', 'val'), roots)
    )
    path.write_text(''.join(loaders))
    return str(path)


def test_data_root_moves_data_sets_that_share_one(tmp_path):
    moved = load_config(write_roots(tmp_path, ['data', 'data']), 'data_root=/there')
    for split in ('train', 'val'):
        assert moved[f'{split}_dataloader'].dataset.data_root == '/there'


def test_data_root_moves_no_data_sets_of_several_roots(tmp_path):
    path = write_roots(tmp_path, ['data', 'other'])
    with pytest.raises(ValueError, match=r'the data sets of .*roots.py have no common data_root'):
        load_config(path, 'data_root=/there')


def test_data_root_may_stay_where_it_is():
    cfg = load_config(ADE20K)
    assert as_text(load_config(ADE20K, f'data_root={cfg.data_root}')) == as_text(cfg)


def test_other_options_win_over_data_root():
    own = 'data/coco/mine.json'
    moved = load_config(COCO[0], f'val_evaluator.ann_file={own}', 'data_root=/there')
    assert moved.val_evaluator.ann_file == own
    assert moved.test_evaluator.ann_file == '/there/annotations/instances_val2017.json'


@pytest.fixture
def derived(tmp_path):
    """Return a function that writes a config derived from one here."""

    def write(name: str, lines: str) -> str:
        path = tmp_path / 'derived.py'
        path.write_text(f"_base_ = '{ROOT}/configs/{name}.py'\n{lines}\n")
        return str(path)

    return write


def test_data_root_moves_the_data_of_derived_configs(derived):
    wrapped = """
inner = dict(type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016/half',
             data_prefix=dict(img_path='data/ade/ADEChallengeData2016x'))
train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[inner, inner]))
"""
    moved = load_config(derived(ADE20K, wrapped), 'data_root=/there')
    for dataset in moved.train_dataloader.dataset.datasets:
        assert dataset.data_root == '/there/half'
        assert dataset.data_prefix.img_path == 'data/ade/ADEChallengeData2016x'  # another folder
    assert moved.val_dataloader.dataset.data_root == '/there'


@pytest.mark.parametrize(
    'lines',
    [
        "data_root = 'overridden/where/nothing/reads/it'",
        'data_root = None',
    ],
)
def test_a_data_root_that_nothing_reads_is_an_error(derived, lines):
    with pytest.raises(ValueError, match='data_root=/there: no dataloader of .*derived.py reads'):
        load_config(derived(DETECTION, lines), 'data_root=/there')


# Visualization


@VISBACKENDS.register_module(force=True)
class RecordingVisBackend(LocalVisBackend):
    """A stand-in for TensorBoard, which is not installed."""


def backends(cfg: Config, folder) -> list[type]:
    init_default_scope(cfg.default_scope)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, save_dir=str(folder), name=str(folder)))
    return [type(backend) for backend in visualizer._vis_backends.values()]


@pytest.mark.parametrize('name', [ADE20K, DETECTION])
def test_one_setting_chooses_the_visualization_backends(name, derived, tmp_path):
    assert backends(load_config(name), tmp_path / '1') == [LocalVisBackend]
    option = 'visualizer.vis_backends.0.type=RecordingVisBackend'
    assert backends(load_config(name, option), tmp_path / '2') == [RecordingVisBackend]
    lines = "visualizer = dict(vis_backends=[dict(type='RecordingVisBackend')])"
    cfg = load_config(derived(name, lines))
    assert backends(cfg, tmp_path / '3') == [RecordingVisBackend]
    assert cfg.visualizer.type == load_config(name).visualizer.type


def test_tensorboard_is_written_where_it_is_installed(derived, tmp_path):
    pytest.importorskip('tensorboard')
    lines = """
visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
"""
    cfg = load_config(derived(ADE20K, lines))
    init_default_scope(cfg.default_scope)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, save_dir=str(tmp_path), name='both'))
    visualizer.add_scalars(dict(loss=1.0), step=1)
    visualizer.close()
    written = {path.name.split('.')[0] for path in (tmp_path / 'vis_data').iterdir()}
    assert written == {'scalars', 'events'}


def test_the_visualization_backends_stand_in_one_place():
    files = [p for p in (ROOT / 'configs').rglob('*.py') if 'vis_backends=' in p.read_text()]
    assert files == [ROOT / 'configs' / '_base_' / 'default_runtime.py']
