"""Between the images and the end of the optimizer's step, the host never waits for the device."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from polynext_mm.compat.torch_features import AUTOCAST_BY_DEVICE, FLOAT16_ON_CPUS
from polynext_mm.nn import PolyNeXt
from tests.engine.synchronizations import Synchronizations
from tests.helpers.configs import build_model
from tests.helpers.files import ROOT
from tests.helpers.programs import python, script
from tests.helpers.tiny import TINY_ARCH
from tests.marks import needs


def test_the_counter_finds_what_waits():
    x = torch.arange(4.0)
    with Synchronizations('cpu') as found:
        x + x[:2].sum()
        x.item() if x.numel() == 1 else x[0].item()
        bool((x > 1).any())
        x[x > 1]
        x.nonzero()
    names = [name for name, _ in found.all]
    assert names == ['_local_scalar_dense', '_local_scalar_dense', 'index', 'nonzero']
    assert {file for _, file in found.all} == {f'{__file__}:test_the_counter_finds_what_waits'}


@needs(AUTOCAST_BY_DEVICE)
@pytest.mark.parametrize('settings', [{}, dict(with_cp=True), dict(norm='bn')], ids=str)
def test_backbones_on_a_device(settings):
    """Meta tensors take the ways of an accelerator, and no number can be read from them."""
    count = script('benchmarks/count')

    model = PolyNeXt(TINY_ARCH, drop_path_rate=0.3, grad_clip_norm=5.0, **settings).to('meta')
    model.loss_scale = torch.ones((), device='meta')
    # checkpoints save the autocast of the device, which meta tensors do not have
    autocast = not settings.get('with_cp')
    counter = count.count(model, torch.empty(2, 3, 64, 64, device='meta'), True, autocast)
    assert counter.operations and counter.synchronizations == 0
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.heavy
@pytest.mark.skipif(
    not hasattr(torch._C, '_ensureCUDADeviceGuardSet'),
    reason='this torch makes no CUDA tensors without CUDA, not even without numbers',
)
def test_steps_on_cuda_tensors_that_hold_no_numbers():
    """Loss scaling, clipping and a fused optimizer, in bfloat16 and float16."""
    program = ROOT / 'tests' / 'engine' / 'fake_cuda_step.py'
    assert 'all cases passed' in python(program, PYTHONPATH=str(ROOT))


def batch():
    samples = []
    for _ in range(2):
        label = PixelData(data=torch.randint(0, 150, (1, 64, 64)))
        samples.append(
            SegDataSample(gt_sem_seg=label, metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        )
    return dict(inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, data_samples=samples)


@needs(FLOAT16_ON_CPUS)  # with which fused optimizers came, too
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('arch', ['cpolynext_t', 'apolynext_t'])
def test_whole_steps_of_a_segmentor(arch, dtype):
    """On the CPU, in mm's train_step: only its accuracy waits, which is computed for the log."""
    cfg = Config.fromfile(ROOT / 'configs' / f'upernet_{arch}_ade20k.py')
    cfg.model.backbone.update(arch=TINY_ARCH, init_cfg=None, drop_path_rate=0.3, grad_clip_norm=5.0)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.decode_head.update(in_channels=TINY_ARCH['widths'], channels=8)
    cfg.model.auxiliary_head.update(in_channels=TINY_ARCH['widths'][2], channels=8)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.norm_cfg = dict(type='BN')
    cfg.optim_wrapper.update(dtype=dtype, clip_grad=dict(max_norm=1.0))
    model = build_model(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    stepped = []
    with Synchronizations('cpu') as found:
        wrapper.optimizer.register_step_post_hook(lambda *_: stepped.append(len(found.all)))
        model.train_step(batch(), wrapper)
    (queued,) = stepped
    waits = found.all[:queued]
    assert not [place for _, place in waits if 'polynext_mm' in place], waits
    assert waits and all('accuracy.py' in place for _, place in waits), waits
