"""Gradients of DistributedDataParallel, by LN and by norms over all processes: see test_training.

torchrun --nproc_per_node=N in_every_process.py DEVICE
"""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.networks import build
from tests.helpers.tiny import randomized


def gradients(model, images):
    model.train()
    model.zero_grad()
    outputs = model(images)
    features = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(feature.square().mean() for feature in features).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def backbone(**settings):
    return randomized(build(**settings))


def with_sync_bn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))


def main() -> None:
    kind = sys.argv[1]
    distributed.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if kind == 'cuda':
        torch.cuda.set_device(rank)
    device = torch.device(f'cuda:{rank}' if kind == 'cuda' else kind)
    images = torch.randn(2 * count, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    mine = images[2 * rank : 2 * rank + 2]
    cases = {
        'LN': (backbone(), backbone()),
        'norm over all processes': (
            backbone(norm='bn', norm_size=64),
            backbone(norm='bn', norm_size=64, sync_norm=True),
        ),
    }
    if kind == 'cuda':  # torch has it for no CPU
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(with_sync_bn())
        cases['SyncBatchNorm'] = with_sync_bn(), synced
    for case, (alone, parallel) in cases.items():
        wrapped = DistributedDataParallel(
            parallel.to(device), device_ids=[rank] if kind == 'cuda' else None
        )
        for _ in range(2):
            shared = gradients(wrapped, mine)
        # of running averages, two steps alone take the same as well
        for _ in range(2):
            expected = gradients(alone.to(device), images)
        least = 1e-3 * max(gradient.norm() for gradient in expected.values())
        for name, gradient in expected.items():
            found = shared[f'module.{name}']
            off = (found - gradient).norm() / gradient.norm().clamp_min(least)
            assert off < 1e-3, f'{case}: {name} is off by {off:.1e}'
    distributed.barrier()
    print(f'RANK {rank} agrees', flush=True)
    distributed.destroy_process_group()


if __name__ == '__main__':
    main()
