"""ChannelBatchNorm in training (paper, fully polynomial networks), at every position p::

    y = (x - mean_p) / sqrt(var_p + 1e-5) * w_p * w_channel

mean_p and var_p (biased) are over the batch and the channels. In inference they are constants, so
the norm is a multiplication and an addition: see :mod:`polynext_mm.nn.batch_norm`.

The kernel keeps x and the moments for backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .precision import LN_EPS, wide

BATCH_AND_CHANNELS = (0, 3)


def channel_batch_norm(
    x: Tensor, w_position: Tensor, w_channel: Tensor, over_processes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each position over the batch and the channels.

    Args:
        x: (B, H, W, C).
        w_position: (H, W).
        w_channel: (C,).
        over_processes: Take the moments over the batches of all processes, which may differ in
            size, as SyncBN does.

    Returns:
        A new map (B, H, W, C), float32 (float64 for float64 inputs), and the means and the biased
        variances, (H, W), which carry no gradient.
    """
    if over_processes:
        return plain(x, w_position, w_channel, _moments_over_processes)
    return dispatch.run(plain, _Kernel, x, w_position, w_channel)


def plain(x, w_position, w_channel, moments=None):
    x = wide(x)
    mean, var = (moments or _moments)(x)
    scale = (var + LN_EPS).rsqrt() * w_position
    y = (x - mean[..., None]) * scale[..., None] * w_channel
    return y, mean.detach(), var.detach()


def _moments(x):
    var, mean = torch.var_mean(x, BATCH_AND_CHANNELS, correction=0)
    return mean, var


def _moments_over_processes(x):
    mean = mean_over_processes(x.mean(3))
    var = mean_over_processes((x - mean[..., None]).square().mean(3))
    return mean, var


def mean_over_processes(x: Tensor) -> Tensor:
    """Average over the first dimension and over all processes, with gradient.

    Args:
        x: (B, ...); B may differ between processes.
    """
    total = _SumOverProcesses.apply(torch.cat((x.sum(0).flatten(), x.new_tensor([len(x)]))))
    return (total[:-1] / total[-1]).view(x.shape[1:])


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes; every process's loss depends on it, so gradients are summed too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _SumOverProcesses.forward(None, grad)


class _Kernel(dispatch.Kernel):
    @staticmethod
    def infer(x, w_position, w_channel):
        return plain(x, w_position, w_channel)

    @staticmethod
    def forward(ctx, x, w_position, w_channel):
        y, mean, var = plain(x, w_position, w_channel)
        ctx.save_for_backward(x, w_position, w_channel, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, w_position, w_channel, mean, var = ctx.saved_tensors
        rstd = (var + LN_EPS).rsqrt()[..., None]
        normed = (wide(x) - mean[..., None]).mul_(rstd)
        product = grad * normed
        grad_w_channel = torch.einsum('bhwc,hw->c', product, w_position)
        grad_w_position = torch.einsum('bhwc,c->hw', product, w_channel)
        count = x.shape[0] * x.shape[3]
        grad = grad * w_channel
        grad_mean = grad.sum(BATCH_AND_CHANNELS) / count
        grad = grad.sub_(grad_mean[..., None])
        grad = grad.sub_(normed.mul_((grad_w_position / count)[..., None]))
        grad_x = grad.mul_(rstd * w_position[..., None])
        return grad_x.to(x.dtype), grad_w_position, grad_w_channel
