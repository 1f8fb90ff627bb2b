"""Tests of the Triton kernels of polynomial attention under Triton's interpreter, without a GPU.

test_kernels_in_triton.py runs this file in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before Triton is imported.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from polynext_mm.nn import layers, plain_ops, poly_attention, triton_ops
from polynext_mm.nn.ops import dispatch
from polynext_mm.nn.ops import poly_attention_triton as kernels
from polynext_mm.nn.ops.poly_attention import plain
from tests.helpers.tiny import Operators
from tests.nn.ops import triton_interpreter

TRITON, TORCH = 'poly_attention_triton', 'poly_attention'
ERRORS = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative, of a norm
dtypes = pytest.mark.parametrize('dtype', ERRORS, ids=str)


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    triton_interpreter.mend(monkeypatch)


def inputs(queries, keys, dtype, heads=3, width=32, scale=0.5):
    """q, k and v as views of (B, tokens, heads * width), as the convolutions leave them."""
    generator = torch.Generator().manual_seed(queries + keys)
    maps = [
        torch.randn(2, tokens, heads * width, generator=generator).mul(scale).to(dtype)
        for tokens in (queries, keys, keys)
    ]
    return [t.unflatten(-1, (heads, width)).transpose(1, 2).requires_grad_() for t in maps]


def errors(q, k, v, grad=None):
    """Relative errors of the output and the gradients, against the plain form in float64."""
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, expected = poly_attention(q, k, v), plain(*exact)
    assert out.dtype is v.dtype
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    return [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip((out, *actual), (expected, *wanted))
    ]


@dtypes
@pytest.mark.parametrize(
    'queries, keys',
    [
        (17, 17),
        (33, 150),
        pytest.param(150, 33, marks=pytest.mark.slow),
        pytest.param(196, 196, marks=pytest.mark.slow),
        pytest.param(1050, 1050, marks=pytest.mark.slow),
        pytest.param(700, 1050, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_exact(queries, keys, dtype):
    found = errors(*inputs(queries, keys, dtype, heads=1 if queries > 150 else 3))
    print(f'{queries} x {keys} {dtype}: ' + ' '.join(f'{error:.1e}' for error in found))
    assert max(found) <= ERRORS[dtype]


@dtypes
def test_one_token_attends_to_itself_alone(dtype):
    q, k, v = (t.detach().abs().requires_grad_() for t in inputs(1, 1, dtype))
    out = poly_attention(q, k, v)
    grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out - v).norm() <= ERRORS[dtype] * v.norm()
    assert (grad_v - 1).norm() <= ERRORS[dtype] * v.numel() ** 0.5
    for grad in (grad_q, grad_k):  # zero but for rounding
        assert grad.abs().max() <= 8 * ERRORS[dtype]


def kinds_of_gradients(out):
    noise = torch.randn(2, 3, 4, 40, 32, dtype=torch.float64).to(out.dtype)
    return {
        'expanded': noise[:1, :1, 0, :1, :1].expand_as(out),
        'of a head': noise[:, :1, 0].expand_as(out),
        'strided': noise.permute(0, 1, 3, 2, 4)[:, :, :, 1],
        'last dimension strided': noise[:, :, 0].transpose(0, 1).mT.contiguous().mT.transpose(0, 1),
    }


@pytest.mark.parametrize('kind', ['expanded', 'of a head', 'strided', 'last dimension strided'])
def test_any_strides_of_the_gradient(kind):
    dtype = torch.bfloat16
    q, k, v = inputs(40, 40, dtype)
    grad = kinds_of_gradients(v)[kind]
    assert not grad.is_contiguous()
    assert max(errors(q, k, v, grad)) <= ERRORS[dtype]


def test_any_strides_of_the_inputs():
    dtype = torch.bfloat16
    q, k, v = inputs(40, 70, dtype)
    k = k.detach()[:, :1].expand_as(k).requires_grad_()
    v = v.detach().mT.contiguous().mT.requires_grad_()
    assert max(errors(q, k, v)) <= ERRORS[dtype]


@pytest.mark.parametrize('width', [16, 64])
def test_other_widths_of_a_head(width):
    dtype = torch.float16
    assert max(errors(*inputs(70, 90, dtype, heads=2, width=width))) <= ERRORS[dtype]


@pytest.mark.parametrize('leading', [(), (3,), (2, 2, 2)])
def test_any_leading_dimensions(leading):
    torch.manual_seed(0)
    q, k, v = (torch.randn(*leading, 20, 32).div(2).requires_grad_() for _ in range(3))
    assert max(errors(q, k, v)) <= ERRORS[torch.float32]


@pytest.mark.parametrize(
    'kernel, kind, tile',
    [
        pytest.param(
            kernel,
            kind,
            tile,
            id=f'{kernel} {kind} {tile.queries}x{tile.keys}',
            marks=[pytest.mark.slow] if number else [],
        )
        for kernel, kinds in kernels.TILES.items()
        for kind, tiles in kinds.items()
        for number, tile in enumerate(
            dict.fromkeys(tile._replace(warps=4, stages=2) for tile in tiles)
        )
    ],
)
def test_every_tile_gives_the_same(kernel, kind, tile, monkeypatch):
    dtype = torch.float16 if kind == 'half' else torch.float32
    kind = 'half' if kind == 'half' else 'ieee'
    monkeypatch.setitem(kernels.TILES[kernel], kind, (tile,))
    assert max(errors(*inputs(150, 140, dtype, heads=1))) <= ERRORS[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_large_scores_in_half_precision(dtype):
    q, k, v = (t.detach() for t in inputs(90, 90, dtype, scale=1.0))
    q = q.mul(30).requires_grad_()
    assert (q @ k.mT).abs().max() > 500
    assert max(errors(q, k.requires_grad_(), v.requires_grad_())) <= ERRORS[dtype]


@dtypes
@pytest.mark.filterwarnings('ignore:.*encountered in')  # past the last key, and not used
def test_scores_that_cancel(dtype):
    """Rows of r near zero: sums under the smallest divisor, gradients far over the inputs."""
    q, k, v = (t.detach() for t in inputs(10, 50, dtype))
    q[..., 0], k[..., 0] = 1, -1
    q[..., 1:] = 0
    q[:, :, 5:, 0] = 1 - 2.0**-7
    for t in (q, k, v):
        t.requires_grad_()
    out = poly_attention(q, k, v)
    expected = plain(q.double(), k.double(), v.double())
    assert (out[:, :, :5] == 0).all()
    torch.testing.assert_close(out.double(), expected, rtol=4 * ERRORS[dtype], atol=1e-3)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()


def attend_on_maps(*maps):
    """As PolyAttn does, with 2 heads: (B, H, W, C) to the same."""
    q, k, v = (t.reshape(*t.shape[:1], -1, 2, 32).transpose(1, 2) for t in maps)
    return poly_attention(q, k, v).transpose(1, 2).reshape(maps[0].shape)


def test_maps_go_in_and_out_uncopied():
    x = torch.randn(2, 4, 6, 3 * 64)
    strided = [part.requires_grad_() for part in x.chunk(3, -1)]
    channels_first = [
        t.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in strided
    ]
    copied = []
    for maps in (strided, [t.requires_grad_() for t in channels_first]):
        with torch.autograd.profiler.profile() as profile:
            out = attend_on_maps(*maps)
            grads = torch.autograd.grad(out, maps, torch.ones_like(out))
        assert out.is_contiguous() and all(grad.is_contiguous() for grad in grads)
        copied.append(sum(event.name == 'aten::clone' for event in profile.function_events))
    assert copied == [0, 6]  # the latter because no kernel reads them: in forward and in backward


def test_what_is_kept_is_linear_in_tokens():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        poly_attention(*inputs(100, 100, torch.float32))
    assert sum(kept) == 2 * 3 * 100 * (4 * 32 + 1)


def test_operators_are_well_formed():
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in inputs(20, 30, torch.float32))
    ops = torch.ops.polynext_mm
    torch.library.opcheck(ops.poly_attention_triton, (q, k, v, 1e-12))
    q, k, v = (t.detach() for t in (q, k, v))
    out, factor = ops.poly_attention_triton(q, k, v, 1e-12)
    torch.library.opcheck(
        ops.poly_attention_triton_backward, (torch.ones_like(out), q, k, v, out, factor)
    )


def test_operations_are_counted_in_both_directions():
    product = 2 * 2 * 3 * 20 * 30 * 32
    with FlopCounterMode(display=False) as forward:
        out = poly_attention(*inputs(20, 30, torch.float32))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


def test_compiles_into_one_graph():
    q, k, v = inputs(20, 30, torch.float32)
    compiled = torch.compile(poly_attention, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), poly_attention(q, k, v))
    torch._dynamo.reset()


def test_triton_can_be_turned_off():
    q, k, v = inputs(20, 20, torch.float32)
    with Operators() as called:
        poly_attention(q, k, v)
        with triton_ops(False):
            poly_attention(q, k, v)
            with triton_ops(True):
                poly_attention(q, k, v)
            poly_attention(q, k, v)
        with plain_ops():
            poly_attention(q, k, v)
        poly_attention(q.double(), k.double(), v.double())
    assert called.names == [TRITON, TORCH, TRITON, TORCH, TORCH]


def test_checkpointing_computes_again_as_it_computed():
    q, k, v = inputs(20, 20, torch.float32)
    with Operators() as called:
        with triton_ops(False):
            out = checkpoint(
                poly_attention,
                *(q, k, v),
                use_reentrant=False,
                context_fn=dispatch.checkpoint_contexts,
            )
        out.sum().backward()
    assert TRITON not in called.names and called.names.count(TORCH) == 2


def test_the_branch_of_a_network():
    torch.manual_seed(0)
    branch = layers.PolyAttn(128)
    for param in branch.parameters():
        torch.nn.init.normal_(param, std=0.1)
    x = torch.randn(2, 7, 9, 128)
    results = []
    for enabled in (True, False):
        with triton_ops(enabled):
            y = branch(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), branch.parameters())))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
