"""The fully polynomial and the low-resolution backbone as a user of mm meets them."""

import math
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from polynext_mm.engine import CheckpointGuardHook
from tests.golden import image
from tests.helpers.files import ROOT
from tests.helpers.networks import build
from tests.helpers.programs import python
from tests.helpers.tiny import TINY_ARCH


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**settings):
    return build(arch=TINY_ARCH, norm='bn', norm_size=64, **settings)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 129)])
def test_any_size_gives_the_four_outputs(size):
    outs = tiny().eval()(image(size, batch=3))
    assert [tuple(out.shape[2:]) for out in outs] == [
        tuple(math.ceil(side / stride) for side in size) for stride in (4, 8, 16, 32)
    ]


def test_low_resolution_has_three_outputs_of_small_strides():
    model = build(arch='cpolynext_lr').eval()
    assert model.out_indices == (0, 1, 2)
    assert model.out_strides == (1, 2, 4)
    assert model.out_channels == (72, 144, 288)
    with torch.no_grad():
        outs = model(torch.randn(1, 3, 33, 32))
    assert [tuple(out.shape[1:]) for out in outs] == [(72, 33, 32), (144, 17, 16), (288, 9, 8)]
    with pytest.raises(ValueError, match=r'of \(0, 1, 2\)'):
        build(arch='cpolynext_lr', out_indices=(0, 3))


def test_output_norms_are_polynomial_too_and_have_a_bias():
    model = tiny().train()
    images = image((64, 64), batch=4)
    for out, index in zip(model(images), model.out_indices):
        positions = out.permute(2, 3, 0, 1).flatten(2)
        torch.testing.assert_close(positions.mean(-1), torch.zeros_like(positions[..., 0]))
        model.out_norms[str(index)].bias.data.fill_(3)
    shifted = model(images)[0]
    torch.testing.assert_close(shifted.mean(), torch.tensor(3.0))


def test_frozen_stages_keep_their_statistics():
    model = tiny(frozen_stages=2).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(image((64, 64), batch=2))
    for name, buffer in model.named_buffers():
        frozen = name.startswith(('stages.0', 'stages.1'))
        assert torch.equal(buffer, before[name]) == frozen, name


def test_the_crop_that_becomes_the_size_is_in_mms_log(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'polynext_mm.backbones.polynext.print_log', lambda message, logger: lines.append(message)
    )
    model = tiny().train()
    for size in ((96, 64), (64, 64)):
        model(image(size, batch=2))
    assert len(lines) == 1 and 'resized to the 96x64 of this training' in lines[0]
    assert model.out_norms['0'].running_mean.shape == (24, 16)


@pytest.mark.parametrize('place', ['', 'detector', 'student'])
@pytest.mark.parametrize('resumes', [False, True])
def test_a_resumed_training_keeps_the_size_of_its_checkpoint(resumes, place):
    """Crops of several sizes must not change the shape of the optimizer's saved state."""
    backbone = tiny()
    model: nn.Module = nn.ModuleDict(dict(backbone=backbone))
    if place:
        model = nn.ModuleDict({place: model})
    runner = SimpleNamespace(
        model=model,
        hooks=[],
        work_dir='.',
        _resume=resumes,
        _load_from='a file',
        _train_loop=None,
        _val_loop=None,
        _test_loop=None,
    )
    checkpoint = dict(
        state_dict=model.state_dict(),
        meta=dict(epoch=0, iter=1),
        message_hub=dict(log_scalars={}, runtime_info={}),
    )
    CheckpointGuardHook().after_load_checkpoint(runner, checkpoint)
    backbone.train()(image((96, 64), batch=2))
    assert backbone.norm_size == ((64, 64) if resumes else (96, 64))


PROGRAM = textwrap.dedent("""
    import sys
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, sys.argv[1])
    from tests.helpers.tiny import TINY_ARCH
    from tests.helpers.networks import build

    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    parts = x[:4], x[4:]

    def network(**settings):
        torch.manual_seed(0)
        return build(arch=TINY_ARCH, norm='bn', norm_size=64, with_cp=True, **settings).double()

    def step(model, images, share):
        model.train().zero_grad()
        loss = sum((f * f.detach().cos()).mean() for f in model(images)) * share
        loss.backward()

    alone = network()
    step(alone, x, 1)
    synced = DistributedDataParallel(network(sync_norm=True))
    for _ in range(2):
        synced.module.load_state_dict(network().state_dict())
        step(synced, parts[rank], 2 * len(parts[rank]) / len(x))
    for (name, one), many in zip(alone.named_parameters(), synced.module.parameters()):
        torch.testing.assert_close(many.grad, one.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, one), many in zip(alone.named_buffers(), synced.module.buffers()):
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12, msg=name)

    own = DistributedDataParallel(network())
    step(own, parts[rank], 1)
    expected = network()
    step(expected, parts[rank], 1)
    mean = expected.cells()[0].norm.running_mean
    torch.testing.assert_close(own.module.cells()[0].norm.running_mean, mean)
    assert not torch.allclose(mean, alone.cells()[0].norm.running_mean)

    # a checkpoint of another size is loaded after DDP has taken the sizes of parameters
    lines = []
    loaded = DistributedDataParallel(network())
    loaded.module._log = lines.append
    loaded.module.set_norm_size(32)
    for _ in range(2):
        step(loaded, torch.randn(2, 3, 96, 64).double(), 1)
    assert loaded.module.norm_size == (64, 64)
    assert len(lines) == 2 and 'set norm_size to that' in lines[1], lines
    distributed.barrier()
    print(f'RANK {rank} agrees')
""")


@pytest.mark.slow
def test_two_processes_share_statistics_on_request(tmp_path):
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    printed = python(
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', program, ROOT
    )
    assert 'RANK 0 agrees' in printed and 'RANK 1 agrees' in printed
