"""Every operation with a kernel, with inputs for it."""

import torch

from polynext_mm.nn import ops

HEIGHT, WIDTH = 5, 4


def tensors(dtype, *shapes, seed=0):
    """Leaves of unit scale, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for shape in shapes:
        fan_in = shape[-1] if len(shape) == 2 else shape[-1] ** 2 if len(shape[1:]) == 3 else 1
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        leaves.append((noise / max(fan_in, 1) ** 0.5).to(dtype).requires_grad_())
    return leaves


def maps(dtype, batch, channels, count=1, height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for _ in range(count)
    ]


def factor_of(x, keep):
    """The factors of drop path of a map, or None."""
    return torch.tensor([0.0, 1.25]).view(-1, 1, 1, 1).to(x) if keep else None


def norm_of_pair(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, count=2, **size) + tensors(dtype, (7,), (7,), (7,))
    return ops.norm_of_pair, inputs


def layer_norm(dtype, keep, **size):
    return ops.layer_norm, maps(dtype, 2, 7, **size) + tensors(dtype, (7,))


def poly_mlp(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (5,), (7, 5))
    return lambda x, *weights: ops.add_poly_mlp(x, factor_of(x, keep), *weights), inputs


def poly_mlp_without_norm_weight(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (7, 5))
    return lambda x, w_in, w_out: ops.add_poly_mlp(x, factor_of(x, keep), w_in, None, w_out), inputs


def poly_conv(dtype, keep, inner=5, coarse=5, **size):
    kernels = [(inner, 1, coarse, coarse), (inner, 1, 3, 3), (inner, 1, 3, 3)]
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (inner, 7), *kernels, (7, inner), (7,))
    return lambda x, *weights: ops.add_poly_conv(x, factor_of(x, keep), *weights), inputs


def poly_conv_even(dtype, keep, **size):
    return poly_conv(dtype, keep, inner=6, coarse=3, **size)


def poly_attn(dtype, keep, **size):
    kernels = [(4, 1, 5, 5), (4, 1, 5, 5), (4, 1, 3, 3), (4, 1, 3, 3)]
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (7,), (8, 7), *kernels, (7, 4))
    return lambda x, *weights: ops.add_poly_attn(x, factor_of(x, keep), 2, *weights), inputs


def poly_attention(dtype, keep, **size):
    tokens = [t.detach().flatten(1, 2).requires_grad_() for t in maps(dtype, 2, 4, 3, **size)]
    return ops.poly_attention, tokens


def poly_attention_sums(dtype, keep, **size):
    tokens = [t.detach().flatten(1, 2).requires_grad_() for t in maps(dtype, 2, 4, 3, **size)]

    def both(q, k, v):
        values, weights = ops.poly_attention_sums(q, k, v)
        return torch.cat((values, weights[..., None]), -1)

    return both, tokens


def channel_batch_norm(dtype, keep, height=HEIGHT, width=WIDTH):
    inputs = maps(dtype, 2, 7, height=height, width=width)
    inputs += tensors(dtype, (height, width), (7,))
    return lambda *tensors: ops.channel_batch_norm(*tensors)[0], inputs


def depthwise(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (7, 1, 5, 5))
    return lambda x, weight: ops.depthwise(x, weight, 2), inputs


OPS = [
    layer_norm,
    norm_of_pair,
    poly_mlp,
    poly_mlp_without_norm_weight,
    poly_conv,
    poly_conv_even,
    poly_attn,
    poly_attention,
    poly_attention_sums,
    channel_batch_norm,
    depthwise,
]
