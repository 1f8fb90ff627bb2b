"""Settings that name nothing, options that nothing takes, numbers of classes that do not match."""

from pathlib import Path

import pytest
from mmengine.config import Config

from polynext_mm.engine.checks.config import ConfigError, check_config, override
from polynext_mm.engine.checks.schedule import schedule_problems
from tests.helpers.files import CONFIG, ROOT
from tests.segmentation_sample import segmentation_config

MASK_RCNN = ROOT / 'configs' / 'mask_rcnn_cpolynext_t_coco_1x.py'
CASCADE = ROOT / 'configs' / 'cascade_mask_rcnn_cpolynext_s_coco_3x.py'
RETINANET = ROOT / 'configs' / 'retinanet_cpolynext_t_coco_1x.py'


def complaint(path: Path, **overrides) -> str:
    """What is said of a config with settings of a command line."""
    cfg = Config.fromfile(path)
    keys = set(cfg.keys())
    cfg.merge_from_dict(overrides)
    with pytest.raises(ConfigError) as error:
        check_config(cfg, keys, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ('key', 'value', 'told'),
    [
        ('randomnes.seed', 0, 'did you mean randomness.seed?'),
        ('load_form', 'a.pth', 'did you mean load_from?'),
        ('checkpoint.interval', 5, 'did you mean default_hooks.checkpoint.interval?'),
        ('batch_size', 5, 'did you mean train_dataloader.batch_size?'),
        ('resume_from', 'a.pth', 'it is resume=True and load_from now'),
        ('xyz', 1, 'mm reads activation_checkpointing'),
        (
            'default_hooks.checkpoint.intervall',
            5,
            'did you mean default_hooks.checkpoint.interval?',
        ),
        ('default_hooks.chekpoint.interval', 5, 'did you mean default_hooks.checkpoint?'),
        ('default_hooks.logger.intervals', 5, 'did you mean default_hooks.logger.interval?'),
        ('custom_hooks.0.reset_heads', True, 'custom_hooks.0.reset_mismatched_heads?'),
        ('train_cfg.max_iter', 5, 'did you mean train_cfg.max_iters?'),
        ('val_cfg.fp_16', True, 'did you mean val_cfg.fp16?'),
        ('randomness.sed', 0, 'did you mean randomness.seed?'),
        ('env_cfg.cudnn_benchmrk', True, 'did you mean env_cfg.cudnn_benchmark?'),
        ('train_dataloader.batchsize', 2, 'did you mean train_dataloader.batch_size?'),
        ('train_dataloader.sampler.shufle', True, 'did you mean train_dataloader.sampler.shuffle?'),
        ('val_dataloader.dataset.data_rot', '.', 'did you mean val_dataloader.dataset.data_root?'),
        ('param_scheduler.1.pwer', 1, 'did you mean param_scheduler.1.power?'),
        ('optim_wrapper.dtyp', 'float32', 'did you mean optim_wrapper.dtype?'),
        ('optim_wrapper.optimizer.weightdecay', 0, 'optim_wrapper.optimizer.weight_decay?'),
        ('val_evaluator.iou_metric', ['mIoU'], 'did you mean val_evaluator.iou_metrics?'),
        ('default_hooks.checkpoint.interval', '16k', "'16k': it must be a number of type int"),
        ('default_hooks.checkpoint.interval', 0, 'it must be a positive whole number'),
        ('train_cfg.val_interval', 0, 'it must be a positive whole number'),
        ('default_hooks.checkpoint.save_best', 'mIou', 'did you mean mIoU?'),
        ('default_hooks.checkpoint.by_epoch', True, 'nothing would be saved before its end'),
        ('default_hooks.checkpoint.save_best', True, 'True: it must be the name of a metric'),
        ('default_hooks', 'x', "default_hooks='x': it must be a dict of settings"),
        ('default_hooks.logger', 'x', "default_hooks.logger='x': it must be a dict of settings"),
        ('custom_hooks', 'x', "custom_hooks='x': it must be a list of hooks"),
        ('val_evaluator.iou_metrics', 'mIoU', "iou_metrics='mIoU': it must be a list of names"),
        ('train_dataloader', 3, 'train_dataloader=3: it must be a dict of settings'),
        ('train_dataloader.num_workers', '4', "'4': it must be a whole number, 0 or more"),
        ('train_dataloader.num_workers', -1, '-1: it must be a whole number, 0 or more'),
        ('val_dataloader.num_workers', 0, 'set val_dataloader.persistent_workers=False'),
        ('train_dataloader.batch_size', 0, '0: it must be a whole number, 1 or more'),
        ('train_dataloader.batch_size', 2.0, '2.0: it must be a whole number, 1 or more'),
        ('randomness.seed', 'abc', "'abc': it must be a whole number, 0 to 4294967295"),
        ('randomness.seed', -1, '-1: it must be a whole number, 0 to 4294967295'),
        (
            'crop_size',
            (64, 64),
            'set model.test_cfg.crop_size and train_dataloader.dataset.pipeline',
        ),
        ('train_cfg.max_iters', 320000, '0 for the last 159999'),
        ('param_scheduler.1.by_epoch', True, 'set param_scheduler.1.by_epoch=False'),
        ('train_cfg.val_begin', 200000, 'and no validation takes place'),
        (
            'default_hooks.checkpoint.rule',
            'more',
            "rule='more': rule must be greater, less or None",
        ),
        ('model.decode_head.in_channels', [64, 128, 256, 384], 'in_channels=[48, 96, 192, 288]'),
        ('model.auxiliary_head.in_channels', 96, 'set model.auxiliary_head.in_channels=192'),
        ('model.auxiliary_head.in_index', 4, 'in_index=4, but the backbone (cpolynext_t) returns'),
        ('model.decode_head.loss_decode.class_weight', [1.0, 2.0], 'has 2 weights, and there are'),
        ('train_dataloader.dataset.metainfo', {'palette': [[0, 0, 0]]}, 'palette has 1 colours'),
        ('optim_wrapper.optimizer.lr', -1, 'lr=-1: it must be a number, 0 or more'),
        ('optim_wrapper.optimizer.lr', '1e-4x', "lr='1e-4x': it must be a number, 0 or more"),
        ('optim_wrapper.optimizer.lr', float('nan'), 'lr=nan: it must be a number, 0 or more'),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_with_the_nearest(key, value, told):
    message = complaint(CONFIG, **{key: value})
    assert told in message and (key.rsplit('.', 1)[0] in message or key == 'train_cfg.max_iters')
    assert message.startswith('1 invalid setting:')


PLACES = [
    'default_hooks',
    'default_hooks.checkpoint',
    'default_hooks.checkpoint.interval',
    'default_hooks.checkpoint.save_best',
    'default_scope',
    'custom_hooks',
    'env_cfg',
    'model',
    'optim_wrapper',
    'optim_wrapper.optimizer',
    'param_scheduler',
    'randomness',
    'train_cfg',
    'train_cfg.max_iters',
    'train_dataloader',
    'train_dataloader.dataset',
    'train_dataloader.dataset.metainfo',
    'train_dataloader.sampler',
    'val_evaluator',
    'val_evaluator.iou_metrics',
]


@pytest.mark.parametrize('place', PLACES)
def test_no_value_breaks_the_checks(place):
    cfg = Config.fromfile(CONFIG)
    *outer, name = place.split('.')
    for value in ('x', True, 3, -1.5, None, [], [3], {}, {'type': 'x'}, {'classes': 3}):
        broken = cfg.copy()
        node = broken._cfg_dict
        for key in outer:
            node = node[key]
        node[name] = value
        try:
            check_config(broken)
        except ConfigError:
            pass


def test_another_arch_needs_other_channels_and_weights():
    message = complaint(CONFIG, **{'model.backbone.arch': 'cpolynext_s'})
    assert 'set model.decode_head.in_channels=[72, 144, 288, 432]' in message
    assert 'set model.auxiliary_head.in_channels=288' in message
    assert 'set model.backbone.init_cfg.checkpoint=polynext://cpolynext_s' in message
    message = complaint(MASK_RCNN, **{'model.backbone.arch': 'cpolynext_s'})
    assert 'set model.neck.in_channels=[72, 144, 288, 432]' in message


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('neck.in_channels', [48, 96, 192]),
        ('rpn_head.in_channels', 128),
        ('roi_head.bbox_roi_extractor.out_channels', 128),
        ('roi_head.mask_head.in_channels', 128),
    ],
)
def test_channels_behind_a_neck_are_compared(key, value):
    message = complaint(MASK_RCNN, **{f'model.{key}': value})
    assert message.startswith('1 invalid setting:') and f'model.{key}={value}, but ' in message


def test_nothing_would_ever_be_saved():
    checkpoint = 'default_hooks.checkpoint'
    overrides = {f'{checkpoint}.save_last': False, f'{checkpoint}.save_best': None}
    message = complaint(CONFIG, **overrides, **{f'{checkpoint}.interval': 200000})
    assert 'nothing of 160000 iterations would be saved; set' in message


@pytest.mark.parametrize(
    ('options', 'refused'),
    [
        (dict(total_steps=100), True),
        (dict(total_steps=160000), False),
        (dict(total_steps=100, end=100), False),
        (dict(total_steps=100, by_epoch=True, convert_to_iter_based=True), False),
    ],
)
def test_one_cycle_has_a_step_for_every_iteration(options, refused):
    cfg = Config.fromfile(CONFIG)
    cfg.param_scheduler = [dict(dict(type='OneCycleLR', eta_max=1e-3, by_epoch=False), **options)]
    problems = [one for one in schedule_problems(cfg) if 'total_steps' in one]
    assert bool(problems) is refused
    if refused:
        assert problems[0].endswith('set param_scheduler.0.total_steps=160000')


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    message = complaint(CONFIG, work_dir=str(tmp_path / 'im\udcff'))
    assert message.startswith('1 invalid setting:') and message.isascii()
    assert "work_dir='" in message and "im\\udcff': the name is not UTF-8" in message


def test_a_metric_without_a_rule(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = ['{CONFIG}']\n"
        "val_evaluator = dict(_delete_=True, type='CityscapesMetric', output_dir='out')\n"
        "default_hooks = dict(checkpoint=dict(save_best='averageScore'))"
    )
    assert "Set default_hooks.checkpoint.rule to 'greater' or 'less'" in complaint(path)
    complete = Config.fromfile(path)
    complete.default_hooks.checkpoint.rule = 'greater'
    check_config(complete)


def test_background_has_a_weight_of_its_own():
    path = ROOT / 'configs' / 'mask2former_cpolynext_s_ade20k.py'
    check_config(Config.fromfile(path))
    message = complaint(path, **{'model.decode_head.loss_cls.class_weight': [1.0] * 150})
    assert 'has 150 weights, and there are 151 classes with background' in message


@pytest.mark.parametrize(
    ('key', 'told'),
    [
        ('param_scheduler.7.end', 'param_scheduler is a list of 2, counted from 0; the last is'),
        ('param_scheduler.2', 'param_scheduler is a list of 2, counted from 0; the last is'),
        ('default_scope.name', "default_scope='mmseg' has no settings inside"),
    ],
)
def test_keys_that_lead_nowhere_are_refused(key, told):
    with pytest.raises(ConfigError) as error:
        override(Config.fromfile(CONFIG), {key: 5})
    assert told in str(error.value)


def test_a_setting_that_is_none_takes_options():
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = None
    override(cfg, {'model.backbone.init_cfg.type': 'Pretrained', 'new.setting': 1})
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained') and cfg.new.setting == 1


def test_a_checkpoint_is_enough_where_there_was_no_init_cfg():
    path, expected = 'model.backbone.init_cfg', dict(type='Pretrained', checkpoint='a.pth')
    for options in (
        {f'{path}.checkpoint': 'a.pth'},
        {f'{path}.type': 'Pretrained', f'{path}.checkpoint': 'a.pth'},
        {f'{path}.checkpoint': 'a.pth', f'{path}.type': 'Pretrained'},
    ):
        cfg = Config.fromfile(CONFIG)
        cfg.model.backbone.init_cfg = None
        override(cfg, options)
        assert cfg.model.backbone.init_cfg == expected


def test_a_coco_metric_is_looked_up_with_its_prefix():
    message = complaint(MASK_RCNN, **{'default_hooks.checkpoint.save_best': 'bbox_mAP'})
    assert 'did you mean coco/bbox_mAP?' in message


def test_all_mistakes_are_told_at_once():
    message = complaint(CONFIG, **{'randomnes.seed': 0, 'train_cfg.max_iter': 5})
    assert 'randomness.seed' in message and 'train_cfg.max_iters' in message


@pytest.mark.parametrize(
    'overrides',
    [
        {'randomness.seed': 0},
        {'work_dir': 'w', 'load_from': None, 'resume': False, 'launcher': 'none'},
        {'model_wrapper_cfg': dict(find_unused_parameters=True), 'find_unused_parameters': True},
        {'compile': True, 'experiment_name': 'x'},
        {'data_root': 'elsewhere'},
        {'default_hooks.checkpoint.max_keep_ckpts': 2, 'default_hooks.checkpoint.priority': 'LOW'},
        {'default_hooks.timer': None, 'default_hooks.checkpoint.interval': -1},
        {'train_dataloader.num_batch_per_epoch': 2, 'train_dataloader.pin_memory': True},
        {'randomness.seed': None, 'optim_wrapper.optimizer.lr': 0},
        {'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False},
        {'param_scheduler.1.end': 158500},  # the last percent, at a learning rate of 0
        {'param_scheduler.1.end': 80000, 'param_scheduler.1.eta_min': 1e-6},
        {'train_cfg.max_iters': 2},  # tried out: the schedule is longer
        {'default_hooks.checkpoint': None},  # a warning
        {'default_hooks.checkpoint.save_last': False},
        {'val_evaluator.iou_metrics': ['mFscore'], 'default_hooks.checkpoint.save_best': 'mFscore'},
        {'default_hooks.checkpoint.save_best': 'auto'},
        {'model.decode_head.loss_decode.class_weight': [1.0] * 150},
        {'model.decode_head.in_index': [-4, -3, -2, -1]},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_mm_reads_passes(overrides):
    cfg = Config.fromfile(CONFIG)
    keys = set(cfg.keys())
    cfg.merge_from_dict(overrides)
    check_config(cfg, keys, overrides)


def written(tmp_path: Path, text: str) -> Config:
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = ['{CONFIG}']\n{text}")
    return Config.fromfile(path)


@pytest.mark.parametrize(
    ('text', 'nearest'),
    [
        ("load_form = 'a.pth'", 'load_from'),
        ('randomnes = dict(seed=0)', 'randomness'),
        ("custom_hook = [dict(type='EMAHook')]", 'custom_hooks'),
        ('train_dataloaders = dict(batch_size=1)', 'train_dataloader'),
    ],
)
def test_a_misspelt_key_of_a_file_is_refused(tmp_path, text, nearest):
    with pytest.raises(ConfigError, match=f'did you mean {nearest}'):
        check_config(written(tmp_path, text))


@pytest.mark.parametrize(
    'text',
    [
        'num_classes = 150',
        'my_option = 1',
        # used by the file itself
        'test_dataloader_2 = dict()\ntest_dataloader = test_dataloader_2',
    ],
)
def test_variables_of_a_file_pass(tmp_path, text):
    cfg = written(tmp_path, text)
    if 'test_dataloader_2' in cfg:
        cfg.test_dataloader = None
    check_config(cfg)


@pytest.mark.parametrize(
    ('path', 'heads'),
    [
        (CONFIG, ['decode_head', 'auxiliary_head']),
        (MASK_RCNN, ['roi_head.bbox_head', 'roi_head.mask_head']),
        (RETINANET, ['bbox_head']),
        (CASCADE, ['roi_head.bbox_head.0', 'roi_head.bbox_head.2', 'roi_head.mask_head']),
    ],
    ids=['segmentor', 'two stages', 'one stage', 'cascade'],
)
def test_each_head_is_held_to_the_classes_of_the_data(path, heads):
    for head in heads:
        key = f'model.{head}.num_classes'
        message = complaint(path, **{key: 7})
        assert message.startswith('1 invalid setting:') and f'{key}=7' in message
        classes = 150 if path == CONFIG else 80
        assert f'has {classes} classes' in message and f'set {key}={classes}' in message


def test_classes_of_the_data_are_held_to_all_heads():
    metainfo = dict(classes=('tree', 'house'))
    message = complaint(MASK_RCNN, **{'val_dataloader.dataset.metainfo': metainfo})
    assert message.startswith('2 invalid settings:')
    assert 'val_dataloader.dataset (CocoDataset) has 2 classes (tree, house)' in message


def test_a_head_that_leaves_num_classes_to_its_default_is_compared():
    cfg = Config.fromfile(RETINANET)
    cfg.model.bbox_head = dict(type='RTMDetHead', num_classes=80)
    check_config(cfg)
    roi_head = Config.fromfile(MASK_RCNN)
    del roi_head.model.roi_head.bbox_head.num_classes  # 80 by default
    check_config(roi_head)
    roi_head.train_dataloader.dataset.metainfo = dict(classes=('tree',))
    with pytest.raises(ConfigError, match='model.roi_head.bbox_head.num_classes=80'):
        check_config(roi_head)


def test_the_proposals_have_one_class():
    message = complaint(MASK_RCNN, **{'model.rpn_head.num_classes': 80})
    assert 'model.rpn_head.num_classes=80: it tells objects from background' in message


def test_one_word_is_no_list_of_classes():
    message = complaint(MASK_RCNN, **{'train_dataloader.dataset.metainfo': dict(classes='tree')})
    assert "write ('tree',)" in message


def test_wrapped_data_sets_are_compared(tmp_path):
    cfg = segmentation_config(tmp_path)
    inner = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset',
        datasets=[inner, dict(type='RepeatDataset', times=2, dataset=inner)],
    )
    check_config(cfg)
    cfg.train_dataloader.dataset.datasets[1].dataset.metainfo = dict(classes=('one', 'two'))
    with pytest.raises(ConfigError, match=r'datasets\.1\.dataset \(BaseSegDataset\) has 2 classes'):
        check_config(cfg)


# mistakes that mm's own configs have
KNOWN = {
    # 320,000 iterations with the schedule of 160,000
    'beit-large_upernet_8xb1-amp-160k_ade20k-640x640': 'param_scheduler.1.end=160000',
    'beit-large_upernet_8xb1-amp-160k_ade20k-640x640_ms': 'param_scheduler.1.end=160000',
    'san-vit-b16_voc12aug-640x640': 'decode_head.num_classes=20',
    'san-vit-l14_voc12aug-640x640': 'decode_head.num_classes=20',
    'faster-rcnn_r50_fpn_1x_voc0712-cocofmt': 'val_evaluator.eval_mode',
}


@pytest.mark.slow
@pytest.mark.parametrize('package', ['mmseg', 'mmdet'])
def test_configs_of_mm_pass(package):
    folder = Path(__import__(package).__file__).parent / '.mim' / 'configs'
    checked, refused = 0, {}
    for path in sorted(folder.rglob('*.py')):
        if '_base_' in path.parts or '__pycache__' in path.parts:
            continue
        try:
            cfg = Config.fromfile(path)
        except (ImportError, FileNotFoundError):
            continue  # needs a package that is not installed, or the model zoo
        checked += 1
        try:
            check_config(cfg)
        except ConfigError as error:
            refused[path.stem] = str(error)
    assert checked > 600
    unexpected = {name: text for name, text in refused.items() if KNOWN.get(name, '\0') not in text}
    assert not unexpected
