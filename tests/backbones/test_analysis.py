"""mmengine's count of operations and parameters, which traces a model, and torch.jit.trace.

Detectors are counted in tests/detection.
"""

import io
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm

from polynext_mm.commands import main
from polynext_mm.compat.packages import stack_name
from tests.helpers import zipped
from tests.helpers.configs import build_model
from tests.helpers.files import CONFIG, mm_folder
from tests.helpers.networks import assert_counted_right, build
from tests.helpers.tiny import TINY_ARCH, randomized


def tiny_segmentor() -> Config:
    """Return the config of the tiny network with narrow UperNet heads."""
    cfg = Config.fromfile(CONFIG)
    widths = TINY_ARCH['widths']
    cfg.model.backbone.update(arch=TINY_ARCH, init_cfg=None)
    cfg.model.decode_head.update(in_channels=list(widths), channels=16)
    cfg.model.auxiliary_head.update(in_channels=widths[2], channels=16)
    return cfg


@pytest.mark.parametrize('settings', [dict(), dict(grad_clip_norm=5.0, out_norm=False)])
def test_a_backbone_is_counted_right(settings):
    assert_counted_right(build(**settings).eval(), torch.randn(1, 3, 64, 96))


def test_a_segmentor_is_counted_right():
    model = revert_sync_batchnorm(build_model(tiny_segmentor())).eval()
    assert_counted_right(model, torch.randn(1, 3, 64, 96))


@pytest.mark.heavy
@pytest.mark.skipif(
    stack_name() == 'openmmlab', reason="upstream's tool passes mmengine both inputs and a shape"
)
def test_mmsegs_get_flops(tmp_path, capfd):
    cfg, config = tiny_segmentor(), tmp_path / 'config.py'
    cfg.dump(config)
    tool = mm_folder('mmseg') / 'tools' / 'analysis_tools' / 'get_flops.py'
    main(['run', str(tool), str(config), '--shape', '64', '96'])
    printed = capfd.readouterr().out
    segmentor = build_model(cfg)
    segmentor.auxiliary_head = None  # the tool removes it
    params = sum(param.numel() for param in segmentor.parameters())
    (printed_params,) = re.findall(r'Params: ([\d.]+)K', printed)
    assert float(printed_params) == pytest.approx(params / 1000, rel=1e-3)
    assert re.search(r'Flops: [\d.]+M', printed)


def test_a_trace_is_right_at_another_size():
    model = randomized(build()).double().eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64).double(), check_trace=False)
    x = torch.randn(1, 3, 96, 128).double()
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for actual, expected in zipped(traced(x), model(x)):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_trace_with_a_clip_can_be_saved():
    model = randomized(build(grad_clip_norm=5.0)).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), check_trace=False)
    torch.jit.save(traced, io.BytesIO())  # fails if the trace calls a Python function
