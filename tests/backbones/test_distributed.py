"""Checkpointing and freezing under DDP, in two processes on the CPU."""

import textwrap

import pytest

from tests.helpers.files import ROOT
from tests.helpers.programs import python

PROGRAM = textwrap.dedent("""
    import sys
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, sys.argv[1])
    from tests.helpers.networks import build
    from tests.helpers.tiny import randomized

    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    settings = dict(with_cp=True, frozen_stages=1, drop_path_rate=0., out_indices=(1, 2, 3))
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def step(model, images):
        model.train()
        sum(feature.square().mean() for feature in model(images)).backward()

    alone = randomized(build(**settings))
    parallel = DistributedDataParallel(randomized(build(**settings)))
    step(alone, x)
    for _ in range(2):
        parallel.zero_grad()
        step(parallel, x[2 * rank:2 * rank + 2])
    for (name, one), (_, many) in zip(alone.named_parameters(), parallel.module.named_parameters()):
        frozen = name.startswith(('stem', 'stages.0'))
        assert (one.grad is None) == (many.grad is None) == frozen, name
        if not frozen:
            torch.testing.assert_close(many.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)
    distributed.barrier()
    print(f'RANK {rank} agrees')
""")


@pytest.mark.heavy
def test_two_processes_average_to_the_gradients_of_one(tmp_path):
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    printed = python(
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', program, ROOT
    )
    assert 'RANK 0 agrees' in printed and 'RANK 1 agrees' in printed
