"""The converted config of docs/migration.md says what ours says, and what the old one said."""

from mmengine.config import Config

from tests.docs.pages import blocks_of
from tests.helpers.files import ROOT

OLD, NEW = (
    next(
        Config.fromstring(block.text, '.py')
        for block in blocks_of(ROOT / 'docs' / 'migration.md')
        if block.kind == kind
    )
    for kind in ('py', 'python')
)
OURS = Config.fromfile(ROOT / 'configs' / 'upernet_cpolynext_s_ade20k.py')


def is_part(part: object, whole: object) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and is_part(value, whole[key]) for key, value in part.items()
        )
    return part == whole


def test_the_new_one_is_ours():
    assert [key for key in NEW if key != 'norm_cfg' and not is_part(NEW[key], OURS[key])] == []


def test_nothing_of_ours_that_trains_otherwise_is_left_out():
    exact = (
        'train_dataloader val_dataloader test_dataloader param_scheduler optim_wrapper train_cfg '
        'val_evaluator'
    ).split()
    assert {key: NEW[key] for key in exact} == {key: OURS[key] for key in exact}
    left_out = OURS.model.copy()
    assert left_out.pop('auxiliary_head').loss_decode.loss_weight == 0.4
    assert NEW.model == left_out


def test_the_old_one_said_the_same():
    head = dict(OLD.model.decode_head, in_channels=NEW.model.decode_head.in_channels)
    assert head == NEW.model.decode_head
    assert OLD.model.test_cfg == NEW.model.test_cfg
    preprocessor = NEW.model.data_preprocessor
    assert (OLD.img_norm_cfg.mean, OLD.img_norm_cfg.std) == (preprocessor.mean, preprocessor.std)
    assert OLD.crop_size == preprocessor.size
    assert OLD.data.samples_per_gpu == NEW.train_dataloader.batch_size
    assert OLD.runner.max_iters == NEW.train_cfg.max_iters
    assert OLD.evaluation.interval == NEW.train_cfg.val_interval
    optimizer = dict(OLD.optimizer)
    custom_keys = optimizer.pop('paramwise_cfg')['custom_keys']
    assert dict(optimizer, fused=True) == NEW.optim_wrapper.optimizer
    assert custom_keys['head']['lr_mult'] == NEW.optim_wrapper.paramwise_cfg.head_lr_mult
    warm_up, decay = NEW.param_scheduler
    assert (OLD.lr_config.warmup_iters, OLD.lr_config.warmup_ratio) == (
        warm_up['end'] - 1,
        warm_up['start_factor'],
    )
    assert OLD.runner.max_iters == decay['end'] - 1
