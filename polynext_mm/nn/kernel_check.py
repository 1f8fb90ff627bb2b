"""Check the Triton kernels on this machine before relying on them.

The kernels may never have run with this machine's compiler or driver. So every kernel is compared
with torch's operations on small maps, forward and backward; if one differs by more than rounding or
does not compile, torch's operations replace it. What passed is remembered on disk, for this kind of
GPU, this torch, this Triton and these kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from . import ops
from .layers import PolyConv, PolyMLP
from .ops import dispatch
from .ops.precision import matmul_dtype
from .ops.stream import NarrowStream

CHANNELS = 72
SIZE = (9, 14)  # of maps: several blocks for any kernel
TOKENS = 196
MODULES = (
    'norms_triton',
    'depthwise_triton',
    'partners_triton',
    'residual_triton',
    'poly_attention_triton',
)
# Differences beyond this are not due to rounding; float32 is summed in another order.
LEAST = {torch.float32: 1e-5}

Operation = Callable[..., Tensor]


class Finding(NamedTuple):
    """A kernel that must not be used.

    Args:
        kernel: What it computes.
        module: The module of :mod:`polynext_mm.nn.ops` that it is in.
        reason: Why, in one line.
    """

    kernel: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f'the Triton kernel of {self.kernel} ({self.module}) {self.reason}'


class Result(NamedTuple):
    """What a check found.

    Args:
        findings: The kernels that must not be used; empty if all is well.
        text: How the check went, in one line for a log.
    """

    findings: tuple[Finding, ...]
    text: str

    def refused(self) -> list[str]:
        """Return the modules to replace by torch's operations: kernels in a module share code."""
        return sorted({finding.module for finding in self.findings})


def check(device: torch.device, dtypes: Iterable[torch.dtype]) -> Result:
    """Compare all kernels with torch's operations, unless that was done on such a machine before.

    Only passes are remembered, so a machine that was fixed is checked again at the next start. The
    states of random generators are unchanged.

    Args:
        device: A GPU that Triton runs on.
        dtypes: Of products and convolutions; half precision is through autocast.

    Raises:
        RuntimeError: If a kernel has left the device unusable, or there is no memory for the check.
    """
    if not available(device):
        return Result((), "no kernels in Triton here: operations take torch's")
    files = {dtype: record(device, dtype) for dtype in dict.fromkeys(dtypes)}
    new = [dtype for dtype, (path, _) in files.items() if not path.exists()]
    names = ', '.join(_name(dtype) for dtype in files)
    if not new:
        folder = next(iter(files.values()))[0].parent
        return Result((), f'Triton kernels agreed with torch before, in {names} ({folder})')
    findings: list[Finding] = []
    text = f'Triton kernels were compared with torch in {", ".join(map(_name, new))}'
    for dtype in new:
        with _untuned_convolutions():
            found = list(_compare(device, dtype))
        findings += found
        if not found:
            try:
                _remember(*files[dtype])
            except OSError as error:  # such as a home directory that cannot be written
                text += f'; that cannot be remembered: {error}'
    return Result(tuple(findings), text)


def available(device: torch.device) -> bool:
    """Return whether Triton kernels may run on a device."""
    if dispatch.triton_module('triton_operators') is None or dispatch.kernel_mode() == 'off':
        return False
    from .ops import triton_operators

    return triton_operators.runs_on(device)


# What is compared


class Case(NamedTuple):
    kernel: str
    module: str
    make: Callable[[], tuple[Operation, list[tuple[int, ...]]]]


def _poly_mlp():
    layer = PolyMLP(CHANNELS, 2)
    return _calling(layer), [_map(CHANNELS), *_shapes(layer)]


def _poly_conv():
    layer = PolyConv(CHANNELS, 1, 5)
    return _calling(layer), [_map(CHANNELS), *_shapes(layer)]


def _two_branches():
    """Run two branches, the second of which reads the copy that the first writes."""
    layer = PolyMLP(CHANNELS, 2)
    call = _calling(layer)

    def op(x, *weights):
        stream = NarrowStream(matmul_dtype(x), [True])
        return call(call(x, *weights, stream=stream), *weights, stream=stream)

    return op, [_map(CHANNELS), *_shapes(layer)]


def _norm_of_pair():
    return ops.norm_of_pair, [_map(CHANNELS)] * 2 + [(CHANNELS,)] * 3


def _layer_norm():
    return ops.layer_norm, [_map(CHANNELS), (CHANNELS,)]


def _depthwise(size):
    def op(x, weight):
        return ops.depthwise(x, weight, 2)

    return op, [_map(CHANNELS), (CHANNELS, 1, size, size)]


def _attention():
    def op(*maps):
        q, k, v = (m.to(matmul_dtype(m)) for m in maps)
        return ops.poly_attention(q * q.shape[-1] ** -0.5, k, v)

    return op, [(2, 3, TOKENS, 32)] * 3


CASES = (
    Case('LN(x)', 'norms_triton', _layer_norm),
    Case('LN(u * v)', 'norms_triton', _poly_mlp),
    Case('LN(a0 * s0 + a1 * s1)', 'norms_triton', _norm_of_pair),
    Case('x + keep * LN(z)', 'norms_triton', _poly_conv),
    Case('dilated 3x3 convolution', 'depthwise_triton', lambda: _depthwise(3)),
    Case('dilated 5x5 convolution', 'depthwise_triton', lambda: _depthwise(5)),
    Case('convolutions in PolyConv', 'depthwise_triton', _poly_conv),
    Case("the product of PolyConv's partners", 'partners_triton', _poly_conv),
    Case('x + keep * branch and its copy', 'residual_triton', _two_branches),
    Case('polynomial attention', 'poly_attention_triton', _attention),
)


def _map(channels: int) -> tuple[int, ...]:
    return 2, *SIZE, channels


def _shapes(layer: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in layer.parameters()]


def _calling(layer: torch.nn.Module) -> Operation:
    names = [name for name, _ in layer.named_parameters()]

    def op(x, *weights, stream=None):
        keep = x.new_tensor([0.0, 1.25]).view(-1, 1, 1, 1)
        arguments = x, None, keep, None, None, stream
        return functional_call(layer, dict(zip(names, weights)), arguments)

    return op


def _inputs(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    # matrices and convolutions preserve the scale of their inputs
    return [
        t / t[0].numel() ** 0.5 if t.ndim == 2 or (t.ndim == 4 and t.shape[1] == 1) else t
        for t in noise
    ]


# How


def _compare(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    for case in CASES:
        with torch.random.fork_rng(devices=[]):  # the layers draw from this generator
            op, shapes = case.make()
        inputs = _inputs(shapes)
        exact = _run(op, inputs, device, torch.float64, MODULES)
        theirs = _errors(_run(op, inputs, device, dtype, MODULES), exact)
        try:
            others = [name for name in MODULES if name != case.module]
            ours = _errors(_run(op, inputs, device, dtype, others), exact)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Triton, its compiler or a driver may raise any
            require_working(device, case, error)
            first = next(iter(str(error).strip().splitlines()), '')
            yield Finding(
                case.kernel,
                case.module,
                f'does not run in {_name(dtype)}: {type(error).__name__}: {first[:200]}',
            )
            continue
        for place, (own, reference) in enumerate(zip(ours, theirs)):
            least = LEAST.get(dtype, 2 * torch.finfo(dtype).eps)
            if not own <= 1.5 * reference + least:  # true for nan as well
                what = 'its result' if place == 0 else f'its gradient {place}'
                yield Finding(
                    case.kernel,
                    case.module,
                    f'is wrong in {_name(dtype)}: {what} is off by {own:.1e}, and '
                    f"torch's by {reference:.1e}",
                )
                break


@contextlib.contextmanager
def _untuned_convolutions() -> Iterator[None]:
    """Let cuDNN take any algorithm: searching for the fastest takes longer than a comparison."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _run(
    op: Operation,
    inputs: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    refused: Iterable[str],
) -> list[Tensor]:
    """Return the result and all inputs' gradients, without the kernels of some modules."""
    half = dtype.itemsize == 2
    leaves = [t.to(device, torch.float32 if half else dtype).requires_grad_() for t in inputs]
    amp = torch.autocast(device.type, dtype) if half else contextlib.nullcontext()
    before = dispatch.refuse_triton(list(refused))
    try:
        with dispatch.plain_ops(False), torch.enable_grad():
            with amp:
                out = op(*leaves)
            ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device)
            grads = torch.autograd.grad(out, leaves, ramp.view(out.shape).to(out.dtype))
            return [t.detach().double() for t in (out, *grads)]
    finally:
        dispatch.refuse_triton(before)


def _errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return relative errors: the larger of the norm's and of the largest element's."""
    errors = []
    for a, b in zip(actual, exact):
        off = a - b
        whole = off.norm() / b.norm()
        errors.append(torch.maximum(whole, off.abs().max() / b.abs().max()).item())
    return errors


def require_working(device: torch.device, case: Case, error: Exception) -> None:
    """Check that a kernel left the device usable: an illegal access ends all work on it."""
    if device.type != 'cuda':
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(
            f'the Triton kernel of {case.kernel} ({case.module}) made the GPU unusable for this '
            f'process: set {dispatch.KERNELS_VARIABLE}=off and start again'
        ) from error


# What is remembered


def folder() -> Path:
    """Return where results are remembered: ``polynext_mm/kernels`` in the user's cache."""
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'polynext_mm' / 'kernels'


def record(device: torch.device, dtype: torch.dtype) -> tuple[Path, dict[str, str]]:
    """Return the file for a result, and its content: everything that the result depends on."""
    import triton

    gpu = str(device)
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        gpu = f'{properties.name}, {properties.major}.{properties.minor}'
    sources = sorted(Path(ops.__file__).parent.glob('*.py'))
    depends = dict(
        gpu=gpu,
        torch=torch.__version__,
        triton=triton.__version__,
        kernels=hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest(),
        dtype=_name(dtype),
    )
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return folder() / f'{digest[:32]}.json', depends


def _remember(path: Path, depends: dict[str, str]) -> None:
    """Write a file atomically, so that no process reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False) as file:
        json.dump(depends, file, indent=1)
    os.replace(file.name, path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
