"""The private names of mm packages are where compat/mmengine.py looks for them, and used there."""

import ast
import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from mmengine import hooks
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

import polynext_mm
from polynext_mm.compat import mmengine as private
from tests.helpers.files import ROOT

# names that are private to torch and to Python, and a method of named tuples
OTHERS = {'_BatchNorm', '_exit', '_getframe', '_metadata', '_replace'}


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs, mode):
        return {'loss': self.layer(inputs).sum(), 'mode': mode}


@pytest.fixture
def runner(tmp_path):
    loader = dict(
        batch_size=1,
        dataset=[torch.zeros(1)],
        sampler=dict(type=DefaultSampler),
        num_workers=0,
    )
    return Runner(
        Model(),
        str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=9, dynamic_intervals=[(3, 2)]),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=3),
        load_from='weights.pth',
        experiment_name=tmp_path.name,
    )


@pytest.mark.heavy
def test_what_a_runner_loads_and_whether_it_trains(runner):
    assert private.load_from(runner) == 'weights.pth' and not private.resumes(runner)
    assert private.loops(runner) == {} and not private.trains(runner)
    private.set_resume(runner, 'newest.pth')
    assert private.resumes(runner) and private.load_from(runner) == 'newest.pth'
    private.set_resume(runner, None)
    assert not private.resumes(runner)
    loop = runner.train_loop
    assert isinstance(loop, IterBasedTrainLoop)
    assert private.trains(runner) and private.loops(runner) == {'train': loop}
    assert private.train_dataloader_settings(runner)['batch_size'] == 1
    loop._iter = 4
    private.decide_val_interval(loop)
    assert loop.val_interval == 2


@pytest.mark.heavy
def test_models_and_optimizer_wrappers(runner):
    assert private.run_forward(Model(), {'inputs': torch.ones(1, 1)}, 'loss')['mode'] == 'loss'
    wrapper = OptimWrapper(torch.optim.SGD(Model().parameters(), lr=0.1), accumulative_counts=3)
    assert private.accumulative_counts(wrapper) == 3
    assert private.accumulative_counts(SimpleNamespace()) == 1


def preprocessors():
    yield ImgDataPreprocessor
    for package, name in (('mmseg', 'SegDataPreProcessor'), ('mmdet', 'DetDataPreprocessor')):
        yield getattr(importlib.import_module(f'{package}.models'), name)


@pytest.mark.parametrize('kind', preprocessors())
@pytest.mark.parametrize('normalizes', [False, True])
@pytest.mark.parametrize('converts', [False, True])
def test_data_preprocessors(kind, normalizes, converts):
    values = dict(mean=[1.0] * 3, std=[1.0] * 3) if normalizes else {}
    preprocessor = kind(bgr_to_rgb=converts, **values)
    assert private.normalizes(preprocessor) is normalizes
    assert private.converts_channels(preprocessor) is converts
    assert private.normalizes(nn.Identity()) is None


def test_settings_of_a_config():
    assert private.settings_of(Config(dict(a=dict(b=1)))) == {'a': {'b': 1}}


# Nobody else


def classes():
    for found in pkgutil.walk_packages(polynext_mm.__path__, 'polynext_mm.'):
        if '.engine' in found.name or '.backbones' in found.name:
            module = importlib.import_module(found.name)
            yield from (c for c in vars(module).values() if inspect.isclass(c))


def test_overridden_methods_are_named_and_exist():
    for kind, names in private.OVERRIDDEN.items():
        assert set(names) <= set(vars(getattr(hooks, kind))), kind
    known = {name for names in private.OVERRIDDEN.values() for name in names}
    of_mm = ('mmengine', 'mmcv', 'mmseg', 'mmdet')
    overridden = {
        name
        for kind in classes()
        if kind.__module__.startswith('polynext_mm')
        for base in kind.__mro__
        if base.__module__.startswith(of_mm)
        for name in vars(kind)
        if name in vars(base) and name.startswith('_') and not name.startswith('__')
    }
    assert overridden - {'_abc_impl'} <= known


def test_no_other_module_touches_a_private_attribute_of_theirs():
    package = ROOT / 'polynext_mm'
    touched = []
    for path in package.rglob('*.py'):
        name = path.relative_to(package).as_posix()
        if name.startswith(
            (
                'nn/',
                'weights/',
                'timm.py',
                'compat/mmengine.py',
                'compat/torch_features.py',
            )
        ):
            continue
        tree = ast.parse(path.read_text(encoding='utf-8'))
        own = {node.name for node in ast.walk(tree) if hasattr(node, 'name')}
        own |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ('self', 'cls')
        }
        touched += [
            f'{name}:{node.lineno} {ast.unparse(node)}'
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith('_')
            and not node.attr.startswith('__')
            and node.attr not in own | OTHERS
            and not ast.unparse(node.value).startswith('torch')
        ]
    assert touched == ['compat/install.py:35 mmcv._ext'], touched
