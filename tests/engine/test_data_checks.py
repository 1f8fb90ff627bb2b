"""What is told before the first step, by our tools and by the hook in other tools."""

import json

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from polynext_mm.datasets import CheckedPipeline, DataError
from polynext_mm.engine.checks import checkpoint as checkpoint_checks
from polynext_mm.engine.checks import data as data_checks
from polynext_mm.weights import CheckpointError
from tests.coco_sample import data_options, make_coco
from tests.helpers.checkpoints import imagenet_weights, other_weights
from tests.helpers.files import ROOT
from tests.helpers.programs import call_tool
from tests.segmentation_sample import (
    constant,
    image_path,
    label_path,
    make_segmentation,
    segmentation_config,
    write_label,
)

CLASSES = ('box', 'ball', 'tent')
RETINANET = ROOT / 'configs' / 'retinanet_cpolynext_t_coco_1x.py'


@pytest.fixture
def root(tmp_path):
    return make_segmentation(tmp_path / 'data')


def refused(cfg) -> str:
    with pytest.raises(DataError) as error:
        data_checks.check_sources(cfg, ('train', 'val'))
    return str(error.value)


def test_sound_data_passes_and_is_counted(root):
    lines, findings = data_checks.inspect_sources(segmentation_config(root), ('train', 'val'))
    assert not findings
    assert lines[0] == f'train_dataloader.dataset: 4 images in {root}/images/train'
    assert lines[1] == f'val_dataloader.dataset: 3 images in {root}/images/val'


def test_an_empty_folder_is_told_with_what_is_there(root):
    for index in range(3):
        path = image_path(root, 'val', index)
        path.rename(path.with_suffix('.tif'))
    message = refused(segmentation_config(root))
    assert f'val_dataloader.dataset: no file in {root}/images/val ends in .jpg' in message
    assert '3 .tif' in message and 'img_suffix' in message


def test_images_without_labels_are_told(root):
    label_path(root, 'train', 2).rename(root / 'labels' / 'train' / '02_gt.png')
    message = refused(segmentation_config(root))
    assert '1 of 4 images have no label' in message and '02.png' in message
    assert 'seg_map_suffix (.png) in place of .jpg' in message


def test_a_class_in_other_letters_is_told(root):
    settings = {'train_dataloader.dataset.type': 'ADE20KDataset'}
    cfg = segmentation_config(root, **settings)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('Wall', 'building'))
    assert 'ADE20KDataset has no class Wall: write wall' in refused(cfg)


def runner_of(cfg, tmp_path) -> Runner:
    cfg.work_dir = str(tmp_path / 'work')
    cfg.experiment_name = tmp_path.name
    return Runner.from_cfg(cfg)


@pytest.mark.heavy
def test_samples_are_loaded_before_the_first_step_and_all_are_checked_later(
    root, tmp_path, monkeypatch
):
    """In training and validation: 32 of each at the start, here one."""
    monkeypatch.setattr(data_checks, 'SAMPLES', 1)
    write_label(root, 'val', 2, constant(76))
    runner = runner_of(segmentation_config(root), tmp_path)
    data_checks.check_before_data(runner, 'train')
    loader = runner.build_dataloader(runner._val_dataloader)
    assert isinstance(loader.dataset.pipeline, CheckedPipeline)
    with pytest.raises(DataError, match=r'02\.png .*has the ids 76'):
        loader.dataset[2]
    monkeypatch.setattr(data_checks, 'SAMPLES', 32)
    with pytest.raises(DataError, match=r'02\.png .*has the ids 76'):
        runner.build_dataloader(runner._val_dataloader)
    assert Runner.build_dataloader is not runner.build_dataloader  # of this runner alone


@pytest.mark.heavy
@pytest.mark.parametrize('checked', [True, False], ids=['hook', 'without'])
def test_the_hook_checks_in_tools_of_mm(root, tmp_path, checked):
    """Labels out of range in validation, which mm leaves out without a word."""
    write_label(root, 'val', 2, constant(76))
    cfg = segmentation_config(root)
    if not checked:
        data_checks.without_checks(cfg)
    cfg.update(train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None)
    cfg.test_dataloader.dataset.pipeline[1].scale = (64, 64)
    cfg.model.test_cfg = dict(mode='whole')
    runner = runner_of(cfg, tmp_path)
    if checked:
        with pytest.raises(DataError, match=r'02\.png .*has the ids 76'):
            runner.test()
    else:
        assert 'mIoU' in runner.test()


@pytest.mark.heavy
def test_the_hook_checks_the_config(root, tmp_path):
    cfg = segmentation_config(root, **{'model.auxiliary_head.num_classes': 9})
    runner = runner_of(cfg, tmp_path)
    with pytest.raises(ValueError, match='model.auxiliary_head.num_classes=9'):
        runner.call_hook('before_run')


@pytest.fixture
def detection(tmp_path):
    root = make_coco(tmp_path / 'coco', CLASSES)
    cfg = Config.fromfile(RETINANET)
    cfg.merge_from_dict(
        {
            key: DictAction._parse_iterable(value)
            for key, value in (option.split('=', 1) for option in data_options(root))
        }
    )
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=CLASSES)
    cfg.model.bbox_head.num_classes = 3
    return root, cfg


def rewrite(root, split, change):
    path = root / 'annotations' / f'instances_{split}2017.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_usable_boxes_of_each_class_are_printed(detection):
    root, cfg = detection
    lines, findings = data_checks.inspect_sources(cfg, ('train', 'val'))
    assert not [finding for finding in findings if finding.serious]
    content = json.loads((root / 'annotations' / 'instances_train2017.json').read_text())
    count = len(content['annotations'])
    assert lines[0].startswith(
        f'train_dataloader.dataset: 4 images, {count} of {count} boxes usable'
    )
    for number, name in enumerate(CLASSES, start=1):
        boxes = [a for a in content['annotations'] if a['category_id'] == number]
        images = len({a['image_id'] for a in boxes})
        assert [name, str(len(boxes)), str(images)] in [
            line.split() for line in lines[0].split('\n')
        ]


def test_a_mistake_in_annotations_is_told_for_every_split(detection):
    root, cfg = detection
    for split in ('train', 'val'):
        rewrite(root, split, lambda c: c['annotations'][0].update(category_id=99))
    message = refused(cfg)
    assert message.count('a category that the file does not list (99)') == 2


def test_a_cut_annotation_file_is_told(detection):
    root, cfg = detection
    path = root / 'annotations' / 'instances_val2017.json'
    path.write_text(path.read_text()[:-9])
    message = refused(cfg)
    assert 'instances_val2017.json' in message and 'is cut short or no JSON' in message


@pytest.mark.heavy
def test_a_data_set_of_which_nothing_is_left_is_told(detection, tmp_path, monkeypatch):
    _, cfg = detection
    cfg.train_dataloader.dataset.filter_cfg.min_size = 1000
    assert 'are on images that filter_cfg leaves out' in refused(cfg)
    cfg.model.backbone.init_cfg = None
    runner = runner_of(cfg, tmp_path)
    # as of a data set whose annotations are not looked through
    monkeypatch.setattr(data_checks, 'check_sources', lambda *_: None)
    data_checks.check_before_data(runner, 'train')
    with pytest.raises(DataError, match='CocoDataset .* has no samples: .*filter_cfg'):
        runner.build_dataloader(cfg.train_dataloader)


def test_an_evaluator_of_other_annotations_is_told(detection):
    root, cfg = detection
    rewrite(root, 'val', lambda c: [entry.update(id=entry['id'] + 70) for entry in c['images']])
    rewrite(
        root, 'val', lambda c: [a.update(image_id=a['image_id'] + 70) for a in c['annotations']]
    )
    cfg.val_evaluator.ann_file = f'{root}/annotations/instances_train2017.json'
    assert 'val_evaluator.ann_file=' in refused(cfg)
    cfg.val_evaluator.ann_file = f'{root}/annotations/none.json'
    assert 'there is no such file: give both the same file' in refused(cfg)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('weights', 'told'),
    [
        (lambda: imagenet_weights('apolynext_t'), 'set arch to that'),
        (lambda: dict(state_dict=dict(list(imagenet_weights().items())[:-9])), 'missing'),
    ],
    ids=['another arch', 'half'],
)
@pytest.mark.parametrize('where', ['load_from', 'init_cfg'])
def test_a_checkpoint_that_does_not_fit_is_told_before_data_is_read(
    root, tmp_path, where, weights, told
):
    path = tmp_path / 'weights.pth'
    torch.save(weights(), path)
    cfg = segmentation_config(tmp_path / 'no data here')
    if where == 'load_from':
        cfg.load_from = str(path)
    else:
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    runner = runner_of(cfg, tmp_path)
    with pytest.raises(CheckpointError, match=told):
        checkpoint_checks.check_checkpoint(runner, 'train')


@pytest.mark.heavy
def test_a_checkpoint_that_fits_is_not_loaded_yet(root, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(other_weights(), path)
    cfg = segmentation_config(root, load_from=str(path))
    runner = runner_of(cfg, tmp_path)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    checkpoint_checks.check_checkpoint(runner, 'train')
    assert all((value == before[key]).all() for key, value in runner.model.state_dict().items())
    with pytest.raises(CheckpointError, match='no output norms'):
        checkpoint_checks.check_checkpoint(runner, 'test')


@pytest.mark.heavy
def test_a_checkpoint_that_is_not_there_is_told(root, tmp_path):
    runner = runner_of(segmentation_config(root, load_from='nowhere.pth'), tmp_path)
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        checkpoint_checks.check_checkpoint(runner, 'train')


def launched(cfg, tmp_path, *arguments) -> str:
    """Return the message with which tools/train.py ends."""
    path = tmp_path / 'config.py'
    cfg.dump(path)
    return call_tool('train', path, '--work-dir', tmp_path / 'work', *arguments)


def test_the_tool_ends_with_one_message(root, tmp_path):
    mistakes = ('--cfg-options', 'randomnes.seed=0', 'checkpoint.interval=9')
    message = launched(segmentation_config(root), tmp_path, *mistakes)
    assert message.startswith('ConfigError: ') and message.count('\n') == 2
    assert not (tmp_path / 'work').exists()


@pytest.mark.heavy
def test_the_tool_checks_what_workers_load(tmp_path):
    """Of 70 samples every second is read before the first step, and one of the others is wrong."""
    root = make_segmentation(tmp_path / 'data', train=70, val=1)
    write_label(root, 'train', 1, constant(76))
    cfg = segmentation_config(root)
    cfg.train_dataloader.update(num_workers=2, persistent_workers=True, batch_size=70)
    message = launched(cfg, tmp_path)
    assert message.startswith('DataError: ') and '\n' not in message
    assert '01.png' in message and 'has the ids 76' in message


@pytest.mark.parametrize('task', ['val', 'test'])
def test_classes_in_another_order_than_those_of_training_are_told(detection, task):
    """Each split in the order of its file, which trains and makes AP wrong."""
    _, cfg = detection
    cfg[f'{task}_dataloader'].dataset.metainfo = dict(classes=('ball', 'box', 'tent'))
    message = refused(cfg)
    assert f'{task}_dataloader.dataset has classes in another order than' in message
    assert "(class 0 is 'ball' and 'box')" in message
    assert 'give all data sets the same metainfo.classes in the same order' in message
    cfg[f'{task}_dataloader'].dataset.metainfo = dict(classes=CLASSES)
    assert not data_checks.inspect_sources(cfg, ('train', 'val'))[1]


def test_files_may_list_their_categories_in_other_orders(detection):
    root, cfg = detection
    rewrite(root, 'val', lambda c: c['categories'].reverse())
    assert not data_checks.inspect_sources(cfg, ('train', 'val'))[1]


def test_classes_of_other_names_in_validation_are_told(root):
    cfg = segmentation_config(root)
    classes = cfg.val_dataloader.dataset.metainfo.classes
    cfg.val_dataloader.dataset.metainfo = dict(classes=(*classes[:-1], 'bush'))
    assert (
        'val_dataloader.dataset has classes of other names than train_dataloader.dataset (class 3 '
        "is 'bush' and 'tree')"
    ) in refused(cfg)


def test_a_class_that_is_named_twice_is_told(root):
    cfg = segmentation_config(root)
    for task in ('train', 'val', 'test'):
        cfg[f'{task}_dataloader'].dataset.metainfo = dict(classes=('a', 'b', 'a', 'c'))
    assert "metainfo.classes has 'a' more than once" in refused(cfg)


def test_mean_and_std_of_pixels_from_0_to_1_are_told(root):
    cfg = segmentation_config(root)
    cfg.model.data_preprocessor.update(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    message = refused(cfg)
    assert 'are of pixels from 0 to 1' in message and message.endswith('multiply both by 255')
    # a step of somebody's own may divide by 255, and so may what OpenCV is not asked to convert
    pipeline = list(cfg.train_dataloader.dataset.pipeline)
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='Normalize', mean=[0], std=[255]))
    cfg.val_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    assert not list(data_checks.scale_findings(cfg))
    cfg.train_dataloader.dataset.pipeline = pipeline
    cfg.model.data_preprocessor.update(mean=[0.0] * 3, std=[1.0] * 3)  # no normalization
    assert not list(data_checks.scale_findings(cfg))


def test_images_of_another_suffix_and_labels_without_images_are_noted(root):
    for index, suffix in enumerate(('.JPG', '.png')):
        path = image_path(root, 'train', index)
        path.rename(path.with_suffix(suffix))
    lines, findings = data_checks.inspect_sources(segmentation_config(root), ('train', 'val'))
    assert lines[0].startswith('train_dataloader.dataset: 2 images')
    images, labels = findings
    assert not images.serious and not labels.serious
    assert '2 images in' in images.what and '(1 .JPG, 1 .png)' in images.what
    assert 'do not end in .jpg and are left out' in images.what
    assert '2 labels in' in labels.what and '00.png, ' in labels.what


def test_labels_beside_their_images_are_no_images(root):
    for index in range(4):
        label = label_path(root, 'train', index)
        label.rename(image_path(root, 'train', index).with_suffix('.png'))
    cfg = segmentation_config(root)
    cfg.train_dataloader.dataset.data_prefix.seg_map_path = 'images/train'
    assert not data_checks.inspect_sources(cfg, ('train',))[1]


def test_a_list_of_images_names_all_that_are_meant(root):
    (root / 'train.txt').write_text('00\n01\n')
    cfg = segmentation_config(root)
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    assert not data_checks.inspect_sources(cfg, ('train',))[1]
