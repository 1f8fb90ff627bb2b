"""Files, models, settings and commands that several tests share."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import polynext_mm  # noqa: F401 - registers
from golden import Golden, authors_weights, image
from polynext_mm.nn import ARCHS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'upernet_cpolynext_t_ade20k.py'
ARCH = 'cpolynext_t'
SIZE = (64, 64)

# The smallest network with everything: both mixers, both kinds of downsampling, an unused gate.
TINY_ARCH = dict(
    widths=(8, 16, 16, 24),
    depths=(1, 2, 1, 1),
    stacks=(1, 2, 1, 1),
    mixers=('conv', 'conv', 'attn', 'attn'),
    conv_ratios=(1, 1, 0.75, 0.75),
    mlp_ratios=(2, 2, 1.75, 1.75),
    coarse_sizes=(3, 5, 5, 5),
    downsampling=('sep3x3', 'full3x3'),
    gate_init=(0, -0.5, -1, -1.5, -2),
)


# Operations


class Operators(TorchDispatchMode):
    """Lists the operators of this package that are called inside, in ``names``."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'polynext_mm':
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


# Networks


def build(**settings) -> nn.Module:
    """Build a PolyNeXt from the registry, by default with TINY_ARCH."""
    return MODELS.build(dict(dict(type='PolyNeXt', arch=TINY_ARCH), **settings))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights with which all of its parts matter, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1:
                param.copy_(noise / param[0].numel() ** 0.5)
            else:  # near its initial value
                param.add_(noise / 4)
    return model


# The authors' files


@functools.cache
def imagenet_weights(arch: str = ARCH) -> dict[str, Tensor]:
    """Return what a published ImageNet file holds, by the golden recipe."""
    return Golden(arch).state_dict()


def other_weights(arch: str = ARCH) -> dict[str, Tensor]:
    """Return weights for the same network that must not be loaded."""
    return {key: value + 1 for key, value in imagenet_weights(arch).items()}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def _training_checkpoint(average: dict, last: dict, n_averaged: int) -> dict:
    return dict(
        epoch=7,
        arch=ARCH,
        args=Namespace(lr=1e-3, data='imagenet'),
        metric=80.1,
        state_dict=prefixed('module.', last),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
        ema_state_dict=dict(n_averaged=torch.tensor(n_averaged), **prefixed('module.', average)),
    )


# Every container that the authors' release reads or writes, holding imagenet_weights().
CONTAINERS = {
    'bare': lambda: imagenet_weights(),
    'state_dict': lambda: dict(state_dict=imagenet_weights(), epoch=3, args=Namespace(lr=0.1)),
    'model': lambda: dict(model=OrderedDict(imagenet_weights())),
    'module.': lambda: dict(state_dict=prefixed('module.', imagenet_weights())),
    'state_dict_ema': lambda: dict(state_dict=other_weights(), state_dict_ema=imagenet_weights()),
    'model_ema': lambda: dict(model=other_weights(), model_ema=imagenet_weights()),
    'ema': lambda: dict(ema=prefixed('module.', imagenet_weights()), state_dict=other_weights()),
    'averaged': lambda: _training_checkpoint(imagenet_weights(), other_weights(), 12),
    'never averaged': lambda: _training_checkpoint(other_weights(), imagenet_weights(), 0),
}


def output_norms(arch: str = ARCH) -> dict[str, Tensor]:
    """Return the output norms of the authors' dense-prediction backbone."""
    return authors_weights(
        {
            f'extra_norms.{stage}.{kind}': (width,)
            for stage, width in enumerate(ARCHS[arch].widths)
            for kind in ('weight', 'bias')
        }
    )


def head_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return weights for the heads of a segmentor, by the golden recipe where it has one."""
    shapes = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.startswith('backbone.')
    }
    weights = authors_weights({k: s for k, s in shapes.items() if not k.endswith('running_var')})
    counts = {k: v.long() for k, v in weights.items() if k.endswith('num_batches_tracked')}
    variances = {k: torch.full(s, 2.0) for k, s in shapes.items() if k.endswith('running_var')}
    return weights | counts | variances


def segmentor_file(cfg: Config, backbone_prefix: str = 'backbone.', **meta) -> dict:
    """Return an mmseg checkpoint as the authors' are: backbone in their names, heads in mmseg's."""
    backbone = {
        k: v
        for k, v in imagenet_weights(cfg.model.backbone.arch).items()
        if k.startswith(('stem', 'cells', 'reductions'))
    }
    state_dict = OrderedDict(
        prefixed(backbone_prefix, backbone | output_norms(cfg.model.backbone.arch))
    )
    state_dict.update(head_weights(build_model(cfg)))
    return dict(meta=dict(meta, epoch=0, iter=160000), state_dict=state_dict)


# What was loaded


def is_golden(backbone: nn.Module) -> bool:
    """Return whether a backbone without output norms computes the golden numbers."""
    with torch.no_grad():
        features = backbone.eval()(image(SIZE))
    for stage, feature in enumerate(features):
        index, value, absmean = Golden(ARCH).values(SIZE, stage)
        off = (feature.contiguous().flatten()[index] - value).abs().max()
        if not off <= 1e-4 * absmean:
            return False
    return len(features) == 4


def is_golden_and_normed(backbone: nn.Module) -> bool:
    """Return whether a backbone with the authors' output norms computes them, normed."""
    weights, reference = output_norms(), build(arch=ARCH, out_norm=False)
    reference.load_state_dict(imagenet_weights(), strict=False)
    with torch.no_grad():
        assert is_golden(reference)
        features, expected = backbone.eval()(image(SIZE)), reference(image(SIZE))
    for stage, (feature, raw) in enumerate(zip(features, expected)):
        weight, bias = (weights[f'extra_norms.{stage}.{kind}'] for kind in ('weight', 'bias'))
        normed = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5)
        if not torch.allclose(feature.permute(0, 2, 3, 1), normed, atol=1e-4):
            return False
    return True


# What a model costs


def assert_counted_right(model: nn.Module, *inputs) -> None:
    """mmengine's count agrees with torch's, which counts products and convolutions alone."""
    found = get_model_complexity_info(model, inputs=inputs, show_table=False, show_arch=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    by_operator = FlopAnalyzer(model, inputs).by_operator()
    assert found['flops'] == sum(by_operator.values())
    products = sum(by_operator.pop(name) for name in ('conv', 'linear', 'matmul'))
    assert products == counter.get_total_flops() / 2
    # the rest is counted by element
    assert all(name.endswith(('_norm', '2d')) for name in by_operator), by_operator
    assert found['params'] == sum(param.numel() for param in model.parameters())


# Small runs of the real configs and tools


def tiny_options(data_root: str | Path, iters: int = 1) -> dict:
    """Return the --cfg-options that make an ADE20K config run in seconds."""
    options = {
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.pipeline.2.scale': (128, 128),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'model.data_preprocessor.size': (64, 64),
        'model.backbone.init_cfg': None,
        'model.decode_head.channels': 16,
        'model.auxiliary_head.channels': 16,
        'model.test_cfg.mode': 'whole',
        'train_cfg.max_iters': iters,
        'train_cfg.val_interval': iters,
        'default_hooks.checkpoint.interval': iters,
    }
    for split in ('train', 'val', 'test'):
        options |= {
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
            f'{split}_dataloader.dataset.data_root': str(data_root),
        }
    for split in ('val', 'test'):
        options[f'{split}_dataloader.dataset.pipeline.1.scale'] = (64, 64)
    return options


def as_arguments(options: dict) -> list[str]:
    return ['--cfg-options', *(f'{key}={value}'.replace(' ', '') for key, value in options.items())]


def tiny_config(data_root: str | Path, work_dir: str | Path, **options) -> Config:
    """Load the ADE20K config of the smallest network, made to run in seconds."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(dict(tiny_options(data_root), **options))
    cfg.work_dir = str(work_dir)
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the segmentor or detector of a config."""
    init_default_scope(cfg.default_scope)
    importlib.import_module(f'{cfg.default_scope}.models')
    return MODELS.build(cfg.model)


def sample_as_ade20k(folder: Path, images: int = 4) -> Path:
    """Make scenes of the demos' sample in ADE20K's layout and return its root."""
    from make_materials import make_split  # of demo/, which processes of some tests cannot see

    root = folder / 'ADEChallengeData2016'
    for split, name in (('training', 'training'), ('tuning', 'validation')):
        make_split(root, split, images)
        for kind in ('images', 'annotations'):
            (root / kind / split).rename(root / kind / name)
    return root


@functools.cache
def few_scenes() -> Path:
    """Make a few scenes of each split of the demos' sample, once, and return their folder."""
    from make_materials import SPLITS, make_split

    folder = Path(tempfile.mkdtemp(prefix='few_scenes_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in SPLITS:
        make_split(folder, split, scenes=8)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the bytes of every file below a folder, by relative path."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }


def mm_folder(package: str) -> Path:
    """Return the folder of mmseg or mmdet that has their configs and tools."""
    return Path(importlib.import_module(package).__file__).parent / '.mim'


def arguments_are(*arguments) -> contextlib.AbstractContextManager:
    """Set the arguments that a script finds in ``sys.argv``."""
    return mock.patch.object(sys, 'argv', ['script.py', *map(str, arguments)])


def call_tool(name: str, *arguments) -> str | None:
    """Run a script of tools/ in this process; return the message it exits with, if it fails."""
    with arguments_are(*arguments):
        try:
            runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        except SystemExit as end:
            return str(end) if end.code else None


def run(
    *command, cwd: Path | None = None, succeeds: bool = True, timeout: float = 900, **env: str
) -> str:
    """Run a command to its end, check whether it succeeds, and return all that it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def python(*arguments, **settings) -> str:
    return run(sys.executable, '-W', 'ignore', *arguments, **settings)


MM_PACKAGES = ('mmengine', 'mmcv', 'mmseg', 'mmdet')

_HIDE = """
import sys


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {packages}:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def python_without(packages: Collection[str], program: str, *arguments, **settings) -> str:
    """Run a program in a fresh interpreter that finds everything but some packages."""
    hide = _HIDE.format(packages=set(packages))
    return python('-c', hide + textwrap.dedent(program), *arguments, **settings)


def free_port() -> int:
    """For processes that look for each other."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
