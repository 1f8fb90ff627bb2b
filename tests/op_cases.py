"""Every operation with a kernel, with inputs for it."""

import torch
from torch.func import functional_call

from polynext_mm.nn import get_arch, ops
from polynext_mm.nn.cell import Cell
from polynext_mm.nn.layers import PolyAttn, PolyConv, PolyMLP
from tests.helpers.tiny import TINY_ARCH

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


def weights_of(branch):
    """The names of a branch's weights, in the order of its kernel."""
    return [f'{name}.weight' for name in branch.kinds]


def factor_of(x, keep):
    """The factors of drop path of a map, or None."""
    return torch.tensor([0.0, 1.25]).view(-1, 1, 1, 1).to(x) if keep else None


def calling(module, names, *others):
    """Return a function of a map, or two, and of a layer's weights by these names.

    Under ``plain_ops()`` it is the layer's equation, otherwise the kernel beside it.
    """

    def op(*inputs):
        count = len(inputs) - len(names)
        weights = dict(zip(names, inputs[count:]))
        keep = others and [None, factor_of(inputs[0], others[0])]
        return functional_call(module, weights, (*inputs[:count], *keep))

    return op


def norm_of_pair(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, count=2, **size) + tensors(dtype, (7,), (7,), (7,))
    cell = Cell(get_arch(TINY_ARCH), 0, 0.0)
    cell.stacks, cell.gate_logits = torch.nn.ModuleList(), None
    return calling(cell, ['scale0', 'scale1', 'norm.weight']), inputs


def layer_norm(dtype, keep, **size):
    return ops.layer_norm, maps(dtype, 2, 7, **size) + tensors(dtype, (7,))


def poly_mlp(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (5,), (7, 5))
    return calling(PolyMLP(7, 10 / 7), weights_of(PolyMLP), keep), inputs


def poly_mlp_without_norm_weight(dtype, keep, **size):
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (10, 7), (7, 5))
    layer = PolyMLP(7, 10 / 7)
    layer.norm.weight = None
    return calling(layer, ['proj_in.weight', 'proj_out.weight'], keep), inputs


def poly_conv(dtype, keep, inner=5, coarse=5, **size):
    kernels = [(inner, 1, coarse, coarse), (inner, 1, 3, 3), (inner, 1, 3, 3)]
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (inner, 7), *kernels, (7, inner), (7,))
    return calling(PolyConv(7, inner / 7, coarse), weights_of(PolyConv), keep), inputs


def poly_conv_even(dtype, keep, **size):
    return poly_conv(dtype, keep, inner=6, coarse=3, **size)


def poly_attn(dtype, keep, **size):
    kernels = [(4, 1, 5, 5), (4, 1, 5, 5), (4, 1, 3, 3), (4, 1, 3, 3)]
    inputs = maps(dtype, 2, 7, **size) + tensors(dtype, (7,), (8, 7), *kernels, (7, 4))
    layer = PolyAttn(7)
    layer.num_heads, layer.scale_logit = 2, None
    return calling(layer, weights_of(PolyAttn), keep), inputs


def of_width(c, dtype, **size):
    """Yield operations with weights of a network's width, and their inputs."""
    kernels = [(c, 1, 5, 5), (c, 1, 3, 3), (c, 1, 3, 3)]
    for (op, _), count, shapes in (
        (norm_of_pair(dtype, True), 2, [(c,)] * 3),
        (layer_norm(dtype, True), 1, [(c,)]),
        (poly_mlp(dtype, True), 1, [(2 * c, c), (c,), (c, c)]),
        (poly_conv(dtype, True), 1, [(c, c), *kernels, (c, c), (c,)]),
    ):
        yield op, [*maps(dtype, 2, c, count, **size), *tensors(dtype, *shapes)]


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
