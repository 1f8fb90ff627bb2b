"""What all configs have in common."""

import pytest
from mmengine.config import Config

from polynext_mm.engine.checks.config import check_config
from tests.helpers.files import CONFIG, ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
SAMPLES = ('landcover', 'treecrowns', 'materials')  # demo/, trained in float32 on CPUs


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_runs_are_checked_and_kept_as_all_others(path):
    cfg, usual = Config.fromfile(path), Config.fromfile(CONFIG)
    check_config(cfg)
    assert cfg.custom_imports.imports[0] == 'polynext_mm'
    assert cfg.custom_hooks == usual.custom_hooks
    assert cfg.default_hooks.checkpoint.type == 'AtomicCheckpointHook'
    assert cfg.optim_wrapper.type == 'AutocastOptimWrapper'
    is_of_a_sample = any(name in path.stem for name in SAMPLES)
    assert cfg.optim_wrapper.dtype == ('float32' if is_of_a_sample else 'bfloat16')
    if cfg.default_scope == 'mmdet' and not is_of_a_sample:
        assert 'backbone' in cfg.optim_wrapper.modules


def test_configs_inherit_from_this_repository_alone():
    for path in (ROOT / 'configs').rglob('*.py'):
        assert '::' not in path.read_text().split('model = dict(', 1)[0], path
