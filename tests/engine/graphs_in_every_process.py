"""CUDAGraphHook under DistributedDataParallel, with a stand-in for the capture on a CPU.

torchrun --nproc_per_node=2 graphs_in_every_process.py DEVICE: see test_cuda_graphs.py and
tests/cuda. Every process trains on images of its own; with graphs and without, the weights must be
the same in all processes.
"""

import gc
import sys
from types import SimpleNamespace

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseDataPreprocessor, BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from polynext_mm.engine import CUDAGraphHook, cuda_graphs
from tests.helpers.networks import build
from tests.helpers.tiny import randomized

STEPS = 4


class Model(BaseModel):
    def __init__(self, device):
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        # a graph draws other random numbers, the stand-in the same
        drop_path_rate = 0.3 if device.type == 'cpu' else 0.0
        self.backbone = randomized(build(drop_path_rate=drop_path_rate, grad_clip_norm=5.0))

    def forward(self, inputs, mode='loss'):
        return dict(loss=sum(f.float().square().mean() for f in self.backbone(inputs)))


class StandIn(torch.autograd.Function):
    """Static memory for images and gradients, as a graph has it."""

    @staticmethod
    def forward(ctx, module, static, x, *params):
        static.copy_(x)
        ctx.params = params
        with torch.enable_grad():
            ctx.outputs = module(static)
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *torch.autograd.grad(ctx.outputs, ctx.params, grads)


def capture(module, sample_args):
    wrappers = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    assert not wrappers, 'a graph is captured beside a wrapper'
    assert not torch.is_autocast_cache_enabled()
    torch.rand(7)  # as warm-ups draw
    (static,) = sample_args
    params = tuple(module.parameters())
    return lambda x: StandIn.apply(module, static, x, *params)


def trained(device, dtype, hooks):
    """The weights after some steps, and how often a graph was replayed."""
    rank = distributed.get_rank()
    model = Model(device).to(device)
    ids = [rank] if device.type == 'cuda' else None

    def wrap(cfg, model):
        return MMDistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    optimizer = dict(type='SGD', lr=0.1)
    wrapper = build_optim_wrapper(
        model,
        ConfigDict(type='AutocastOptimWrapper', dtype=dtype, optimizer=optimizer),
    )
    runner = SimpleNamespace(
        model=wrap(None, model), cfg=Config(), optim_wrapper=wrapper, wrap_model=wrap
    )
    for hook in hooks:
        hook.before_train(runner)
    torch.manual_seed(rank)
    for step in range(STEPS):
        batch = dict(inputs=torch.randn(2, 3, 64, 64).to(device))
        for hook in hooks:
            hook.before_train_iter(runner, batch_idx=step, data_batch=batch)
        runner.model.train_step(batch, wrapper)
        replayed = [g.replayed for hook in hooks for g in hook._graphed]
        assert all(replayed) and len(replayed) == len(hooks)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> None:
    kind = sys.argv[1]
    distributed.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    rank, count = distributed.get_rank(), distributed.get_world_size()
    device = torch.device(f'cuda:{rank}' if kind == 'cuda' else kind)
    if kind == 'cuda':
        torch.cuda.set_device(rank)
    else:
        cuda_graphs._device = lambda backbone: 'cuda'
        torch.cuda.make_graphed_callables = capture
    for dtype in ('bfloat16', 'float16', 'float32'):
        graphed = trained(device, dtype, [CUDAGraphHook()])
        launched = trained(device, dtype, [])
        off = (graphed - launched).norm() / launched.norm()
        assert off < (1e-2 if kind == 'cuda' else 1e-6), (dtype, off)
        everywhere = [torch.empty_like(graphed) for _ in range(count)]
        distributed.all_gather(everywhere, graphed)
        assert all(torch.equal(weights, graphed) for weights in everywhere), dtype
    distributed.barrier()
    print(f'RANK {rank} agrees', flush=True)
    distributed.destroy_process_group()


if __name__ == '__main__':
    main()
