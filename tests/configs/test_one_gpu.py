"""The settings for one GPU in the docs exist, and the recipe sees as many images as before."""

import re
import shlex

import pytest
from mmengine.config import Config, DictAction

from polynext_mm.engine.checks.config import check_config
from tests.helpers.files import ROOT

HEADING = '## One GPU of 24 GB'


def commands() -> list[tuple[str, list[str]]]:
    """Return the configs and options of the commands below the heading, in both pages."""
    found = []
    for page in ('segmentation', 'detection'):
        text = (ROOT / 'docs' / f'{page}.md').read_text()
        section = text.partition(HEADING)[2].split('\n## ', 1)[0].replace('\\\n', ' ')
        for line in re.findall(r'^python tools/train\.py .*', section, re.MULTILINE):
            _, _, config, option, *settings = shlex.split(line)
            assert option == '--cfg-options'
            found.append((config, settings))
    return found


def test_there_are_settings_for_both_tasks():
    assert {'upernet', 'mask'} <= {config.split('/')[1].split('_')[0] for config, _ in commands()}


@pytest.mark.parametrize(('config', 'settings'), commands())
def test_settings_of_one_gpu(config, settings):
    cfg, usual = (Config.fromfile(ROOT / config) for _ in range(2))
    options = {
        key: DictAction._parse_iterable(value)
        for key, value in (setting.split('=', 1) for setting in settings)
    }
    cfg.merge_from_dict(options)
    check_config(cfg, usual.keys(), options)
    batch = cfg.train_dataloader.batch_size
    steps_apart = cfg.optim_wrapper.get('accumulative_counts', 1)
    assert batch * steps_apart == usual.auto_scale_lr.base_batch_size
    assert cfg.optim_wrapper.optimizer == usual.optim_wrapper.optimizer
    # iterations are counted, not steps
    by_iteration = [
        s for s in range(len(cfg.param_scheduler)) if not usual.param_scheduler[s].by_epoch
    ]
    for schedule in by_iteration:
        ends = cfg.param_scheduler[schedule].end, usual.param_scheduler[schedule].end
        assert ends[0] == steps_apart * ends[1]
    if 'max_iters' in usual.train_cfg:
        for now, before in (
            (cfg.train_cfg.max_iters, usual.train_cfg.max_iters),
            (cfg.train_cfg.val_interval, usual.train_cfg.val_interval),
            (cfg.default_hooks.checkpoint.interval, usual.default_hooks.checkpoint.interval),
        ):
            assert now == steps_apart * before
