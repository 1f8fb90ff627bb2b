"""Every message of docs/troubleshooting.md is raised, or is in the source if a CPU cannot."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import urllib.error
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import runner as mmengine_runner
from torch import nn

from polynext_mm.engine.checkpoints import guard
from polynext_mm.engine.checks import training
from polynext_mm.engine.checks.config import check_config
from polynext_mm.engine.checks.findings import DataError, label_fault
from polynext_mm.engine.launch import require_dataset
from polynext_mm.weights import loading, read
from tests.docs.pages import blocks_of
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.configs import build_model
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.networks import build
from tests.helpers.tiny import TINY_ARCH
from tests.segmentation_sample import segmentation_config

MESSAGES = [
    block for block in blocks_of(ROOT / 'docs' / 'troubleshooting.md') if block.kind == 'text'
]
# Of other packages, and on machines that the tests do not run on.
FOREIGN = (
    "No module named 'pkg_resources'",
    'libGL.so.1: cannot open shared object file',
    'CUDA out of memory. Tried to allocate',
    'Expected to have finished reduction in the prior iteration',
)


def small_segmentor(num_classes: int) -> nn.Module:
    cfg = segmentation_config(ROOT)
    cfg.model.backbone.arch = TINY_ARCH
    widths = TINY_ARCH['widths']
    cfg.model.decode_head.update(in_channels=list(widths), num_classes=num_classes)
    cfg.model.auxiliary_head.update(in_channels=widths[2], num_classes=num_classes)
    return build_model(cfg)


def not_registered() -> None:
    with (
        mock.patch.dict(MODELS._module_dict),
        DefaultScope.overwrite_default_scope('mmengine'),
    ):
        del MODELS._module_dict['PolyNeXt']
        MODELS.build(dict(type='PolyNeXt'))


def without_extension() -> None:
    with mock.patch.dict(sys.modules):
        sys.modules.pop('mmcv._ext', None)
        importlib.import_module('mmcv._ext')


def without_network() -> None:
    failure = urllib.error.URLError('Name or service not known')
    with (
        mock.patch('torch.hub.get_dir', return_value='/nowhere/hub'),
        mock.patch('pathlib.Path.mkdir'),
        mock.patch('torch.hub.download_url_to_file', side_effect=failure),
    ):
        read('polynext://cpolynext_s')


def other_classes() -> None:
    weights = small_segmentor(5).state_dict()
    loading.check(small_segmentor(4), weights, 'five.pth', False, evaluation=True)


def other_arch() -> None:
    build().load_state_dict(imagenet_weights('cpolynext_t'))


def wrong_num_classes() -> None:
    cfg = segmentation_config(ROOT)
    cfg.model.decode_head.num_classes = 150
    check_config(cfg)


def misspelt_setting() -> None:
    cfg = Config.fromfile(CONFIG)
    keys = set(cfg.keys())
    cfg.merge_from_dict(dict(load_form='a.pth'))
    check_config(cfg, keys, dict(load_form='a.pth'))


def ids_from_one() -> None:
    label = np.array([[1, 2], [3, 4]], np.uint8)
    raise DataError(f'roofs/0001.png {label_fault(label, (2, 2), 4)}')


def sync_bn() -> None:
    with mock.patch('torch.distributed.is_initialized', return_value=True):
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))


def batch_of_one() -> None:
    loader = SimpleNamespace(batch_size=1)
    runner = SimpleNamespace(
        train_dataloader=loader, model=small_segmentor(4), world_size=1, max_iters=1
    )
    training.TrainingCheckHook._refuse_batch_of_one(runner)


def batch_of_one_in_torch() -> None:
    nn.BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


class Distributed(nn.Module):
    """Looks to the hook like DistributedDataParallel."""

    find_unused_parameters = static_graph = False

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def unused_output() -> None:
    backbone = build()
    sum(feature.sum() for feature in backbone(torch.randn(1, 3, 64, 64))[1:]).backward()
    optimizer = torch.optim.SGD(backbone.parameters(), 1e-3)
    with mock.patch.object(training, 'DistributedDataParallel', Distributed):
        training._report_unused_outputs(Distributed(backbone), optimizer)


def other_normalization() -> None:
    model = small_segmentor(4)
    model.data_preprocessor._channel_conversion = False  # its name in one set of packages
    model.data_preprocessor.channel_conversion = False  # and in the other
    guard.CheckpointGuardHook()._check_normalization(model, is_error=True)


def missing_data() -> None:
    require_dataset(Config.fromfile(CONFIG).train_dataloader.dataset)


def channels_last() -> None:
    build()(torch.zeros(1, 3, 64, 64))[0].view(1, 2, -1)


def four_channels() -> None:
    model = build(arch='cpolynext_t', in_channels=4)
    model.load_state_dict(dict(imagenet_weights('cpolynext_t')), strict=False)


def small_images() -> None:
    build()(torch.randn(1, 3, 30, 36))


#: What provokes a message, by a part of it.
PROVOKED: dict[str, Callable[[], None]] = {
    'is not in the mmengine::model registry': not_registered,
    "No module named 'mmcv._ext'": without_extension,
    "mmcv's operator": lambda: importlib.import_module('mmcv._ext').no_such_operator(),
    'could not download': without_network,
    'for another number of classes': other_classes,
    'the file is of arch': other_arch,
    'model.decode_head.num_classes=150': wrong_num_classes,
    'nothing reads load_form': misspelt_setting,
    'if ids count from 1': ids_from_one,
    'SyncBatchNorm expected input': sync_bn,
    'training with a batch of 1': batch_of_one,
    'Expected more than 1 value per channel': batch_of_one_in_torch,
    'no neck or head uses': unused_output,
    'data_preprocessor gives BGR': other_normalization,
    'data set: ADE20K': missing_data,
    'images must be at least': small_images,
    'view size is not compatible': channels_last,
    'images of 3 channels': four_channels,
}


def pattern(message: str) -> re.Pattern:
    """Return what matches a message of the page: words, and anything for ``...``."""
    parts = ['.*'.join(map(re.escape, word.split('...'))) for word in message.split()]
    return re.compile(r'\s+'.join(parts).replace(r'\s+.*', r'.*'), re.DOTALL)


@cache
def strings_of_the_source() -> list[list[str | None]]:
    """Return the longer messages of this package and mmengine's runner: texts, None for values."""
    paths = [*(ROOT / 'polynext_mm').rglob('*.py'), Path(mmengine_runner.__file__)]
    found = []
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(text) for text in texts if isinstance(text, str)) > 24:
            found.append(texts)
    return found


def is_in_the_source(message: str) -> bool:
    """Whether a string of the source, with values in its gaps, says a message, or more than it."""
    said = pattern(re.sub(r'^\w+Error: ', '', message))
    for texts in strings_of_the_source():
        of_source = ''.join('.*' if text is None else re.escape(text) for text in texts)
        shown = ''.join('...' if text is None else text for text in texts)
        if re.search(of_source, message, re.DOTALL) or said.search(shown):
            return True
    return False


@pytest.mark.parametrize('block', MESSAGES, ids=lambda block: str(block.line))
def test_a_message_is_really_said(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = block.text.strip()
    if any(part in message for part in FOREIGN):
        return
    provoke = [act for part, act in PROVOKED.items() if part in message]
    if not provoke:
        assert is_in_the_source(message), message
        return
    with pytest.raises(Exception) as caught:  # noqa: B017 - the block says which
        provoke[0]()
    said = f'{type(caught.value).__name__}: {caught.value}'
    assert pattern(message).search(said), said


def test_every_provocation_is_of_a_message_on_the_page():
    text = ''.join(block.text for block in MESSAGES)
    assert [part for part in (*PROVOKED, *FOREIGN) if part not in text] == []
