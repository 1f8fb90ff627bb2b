"""Count what a GPU would do, without one: launches, bytes moved, FLOPs, and a bound on the time.

A step runs on meta tensors, which compute nothing; autocast, which meta tensors do not have, is
emulated by CUDA's rules. Every operation that is not a view counts as one launch, or as those it is
known to consist of, and moves its inputs and outputs once: hits in the L2 cache are not credited.
Convolutions are taken to keep channels-last memory, as cuDNN does on GPUs since Ampere in half
precision. An optimizer is not part of a step.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from report import Record
from roofline import is_view
from subjects import MEMORY_FORMATS, Setting, Subject, build_model

aten = torch.ops.aten

DROP_PATH_RATE = 0.3  # in training, of every model


@dataclasses.dataclass(frozen=True)
class Device:
    """What bounds the time of a step.

    Args:
        bandwidth: Bytes per second that memory sustains.
        flops: Dense bfloat16 FLOP per second that matrix products sustain.
        launch: Seconds for the host to launch an operation.
        shortest: Seconds of the shortest kernel.
    """

    bandwidth: float
    flops: float
    launch: float = 5e-6
    shortest: float = 2e-6


#: 80 percent of the peak bandwidth and half of the peak FLOP/s of the data sheets.
DEVICES = {
    'h100': Device(0.8 * 3.35e12, 0.5 * 990e12),
    'a100': Device(0.8 * 2.04e12, 0.5 * 312e12),
}


@dataclasses.dataclass
class Operation:
    """One operation of a step."""

    name: str
    launches: int
    bytes: int
    flops: int = 0

    def seconds(self, device: Device) -> float:
        return max(
            self.bytes / device.bandwidth,
            self.flops / device.flops,
            self.launches * device.shortest,
        )


# Operations that launch nothing, though they are no views.
_FREE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
}
# Operations that read nothing.
_FILLS = {
    'bernoulli_', 'fill_', 'zero_', 'normal_', 'uniform_', 'zeros', 'zeros_like', 'new_zeros',
    'ones_like', 'full', 'full_like', 'new_full', 'scalar_tensor', 'rand',
}  # fmt: skip
# Operations that make the host wait for the device.
_SYNCHRONIZING = {'_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero'}
# Launches of operators of this package that are kernels on a GPU.
_KERNELS = {
    'poly_attention_triton': 1,
    'poly_attention_triton_backward': 2,
    'convolve_triton': 1,
    'depthwise_weight_grad_triton': 1,
    'times_swapped_triton': 1,
    'times_swapped_backward_triton': 1,
    'norm_of_product_triton': 1,
    'norm_of_product_backward_triton': 1,
    'add_branch_triton': 1,
    'add_norm_triton': 1,
    'add_norm_backward_triton': 1,
    'norm_of_sum_triton': 1,
    'norm_of_sum_backward_triton': 1,
}
# The most tensors that a launch of a multi-tensor operation takes, by its lists of them, and the
# blocks of elements (torch's MultiTensorApply.cuh).
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS_OF_A_LAUNCH, _ELEMENTS_OF_A_BLOCK = 320, 65536
_CONCATENATED = 128  # tensors of a launch that concatenates (torch's Shape.cu)
_PRODUCTS = {'mm': (0, 1), 'bmm': (0, 1), 'addmm': (1, 2), 'baddbmm': (1, 2)}


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements."""
    elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)
    return elements * tensor.element_size()


def launches_of_lists(lists: list[list[Tensor]]) -> int:
    """Return the launches of a multi-tensor operation (``_foreach_*``, ``_fused_*``).

    A launch takes a number of tensors and of blocks. Tensors of several shapes or strides in one
    place of the lists are taken one by one instead.

    Args:
        lists: What is read and written, each a list of as many tensors.
    """
    if any(_layout(t) != _layout(first) for first, *others in zip(*lists) for t in others):
        return len(lists[0])
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        left = math.ceil(tensor.numel() / _ELEMENTS_OF_A_BLOCK)
        tensors += 1
        while left:
            taken = min(left, _BLOCKS_OF_A_LAUNCH - blocks)
            left, blocks = left - taken, blocks + taken
            full_of_tensors = tensors == _TENSORS_OF_A_LAUNCH[len(lists)] and not left
            if full_of_tensors or blocks == _BLOCKS_OF_A_LAUNCH:
                launches, tensors, blocks = launches + 1, int(left > 0), 0
    return launches + (tensors > 0)


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the sizes and strides of dimensions, but for those of one element."""
    return [(n, stride) for n, stride in zip(tensor.shape, tensor.stride()) if n != 1]


class Counter(TorchDispatchMode):
    """Record the operations that run under it, in ``operations``."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.synchronizations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition('::')[2]
        if func.namespace == 'polynext_mm' and name not in _KERNELS:
            with self:  # made of torch's operations: count those
                return _implementation(func)(*args, **kwargs)
        if func.namespace == 'aten' and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), 'CompositeImplicitAutograd'
        ):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if name in ('convolution', 'convolution_backward'):
            out = tree_map(_channels_last, out)
        if name in _SYNCHRONIZING:
            self.synchronizations += 1
        if func not in _FREE and not is_view(func):
            self._record(name, func, args, kwargs, out)
        return out

    def _record(self, name, func, args, kwargs, out) -> None:
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        written = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if not any(t.device.type == 'meta' for t in read + written):
            return
        moved = sum(map(size, written)) + (0 if name in _FILLS else sum(map(size, read)))
        launches, flops = _KERNELS.get(name, 1), 0
        target = kwargs.get('out')
        if target is not None and not any(target is arg for arg in args):
            moved -= size(target)  # it is among the arguments, and only written
        if name.startswith(('_foreach_', '_fused_')):
            lists = [arg for arg in args if _is_list_of_tensors(arg)]
            lists += [out] if _is_list_of_tensors(out) else []
            launches = launches_of_lists(lists)
        elif name in ('cat', 'stack'):
            launches = math.ceil(len(read) / _CONCATENATED)
        elif name == 'convolve_triton' and not args[1].flatten(1).t().is_contiguous():
            launches = 2  # one lays out the weights
        if name == 'copy_':
            moved -= size(args[0])
        elif name in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[name])
            flops = 2 * left.numel() * right.shape[-1]
            if target is not None and len(args) > 2 and target is not args[0]:
                self._copy(args[0])  # cuBLAS adds to what is there
        elif name == 'convolution':
            x, weight = args[:2]
            flops = 2 * written[0].numel() * weight[0].numel()
            self._copy_if_scattered(x)
        elif name == 'convolution_backward':
            grad, x, weight, wanted = *args[:3], args[10]
            launches = sum(wanted)
            flops = 2 * grad.numel() * weight[0].numel() * (wanted[0] + wanted[1])
            moved = wanted[0] * (2 * size(grad) + size(weight)) + wanted[1] * (
                size(grad) + size(x) + size(weight)
            )
            self._copy_if_scattered(grad)
            self._copy_if_scattered(x)
        elif name == 'native_layer_norm_backward' and args[-1][1]:
            launches = 3  # that of the weight is two more
            moved += size(args[0]) + size(args[1])
        elif func._overloadpacket in flop_counter.flop_registry and func.namespace == 'polynext_mm':
            flops = flop_counter.flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if name in ('_to_copy', 'copy_'):
            name += ' of a map' if written[0].ndim > 2 and written[0].numel() > 2e5 else ''
        self.operations.append(Operation(name, launches, moved, flops))

    def _copy(self, tensor: Tensor) -> None:
        self.operations.append(Operation('copy before a product', 1, 2 * size(tensor)))

    def _copy_if_scattered(self, x: Tensor) -> None:
        """A convolution copies a map that is neither channels-last nor channels-first."""
        if not x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            self.operations.append(Operation('copy before a convolution', 1, 2 * size(x)))


def _is_list_of_tensors(value) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(t, Tensor) for t in value)
    )


def _implementation(func) -> Callable:
    """Return the Python function behind an operator of this package."""
    from torch._library.custom_ops import OPDEFS

    return OPDEFS[f'{func.namespace}::{func._opname}']._init_fn


def _channels_last(value):
    is_map = isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] > 1
    return value.contiguous(memory_format=torch.channels_last) if is_map else value


class _Autocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16 for meta tensors: what it narrows and what it widens."""

    NARROW = {F.conv2d, F.linear, torch.conv2d, torch.matmul, torch.bmm, torch.mm, torch.baddbmm}
    NARROW |= {Tensor.matmul, Tensor.__matmul__}
    WIDE = {F.layer_norm, torch.layer_norm, torch.pow, Tensor.pow, Tensor.__pow__}
    WIDE |= {torch.sum, Tensor.sum}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.NARROW | self.WIDE and 'out' not in kwargs:
            dtype = torch.bfloat16 if func in self.NARROW else torch.float32

            def cast(value):
                if isinstance(value, Tensor) and value.is_floating_point():
                    return value.to(dtype)
                return value

            args, kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """torch's scaled dot product attention as its fused kernels: one launch, three in backward."""

    counter: Counter

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        flops = 4 * q.numel() * k.shape[-2]
        _FusedAttention.counter.operations.append(Operation('attention', 1, 4 * size(q), flops))
        return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        flops = 10 * q.numel() * k.shape[-2]
        _FusedAttention.counter.operations.append(
            Operation('attention backward', 3, 8 * size(q), flops)
        )
        return tuple(map(torch.empty_like, (q, k, v)))


@contextlib.contextmanager
def _fused_attention(counter: Counter, narrow: bool) -> Iterator[None]:
    original = F.scaled_dot_product_attention
    _FusedAttention.counter = counter

    def attention(q, k, v, **_):
        if narrow:
            q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
        return _FusedAttention.apply(q, k, v)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextlib.contextmanager
def _autocast_of_cuda(enabled: bool) -> Iterator[None]:
    """Turn CUDA's autocast on: this package takes meta tensors for ones of an accelerator."""
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', enabled)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    try:
        with _Autocast() if enabled else contextlib.nullcontext():
            yield
    finally:
        torch.set_autocast_enabled('cuda', before[0])
        torch.set_autocast_dtype('cuda', before[1])


def count(model: nn.Module, image: Tensor, train: bool, bfloat16: bool = True) -> Counter:
    """Count a forward pass, and in training the backward pass of the sum of its outputs' means.

    In inference it is the second: the first makes what a model keeps of its weights.

    Args:
        model: On the meta device; it returns a sequence of feature maps.
        image: (B, 3, H, W), on the meta device.
        train: Whether to count a training step.
        bfloat16: Under autocast to bfloat16, or in float32.
    """
    model.train(train).requires_grad_(train)
    if not train:  # a model keeps what it made of its weights
        with torch.no_grad(), _autocast_of_cuda(bfloat16):
            model(image)
    counter = Counter()
    with counter, _fused_attention(counter, bfloat16), torch.set_grad_enabled(train):
        with _autocast_of_cuda(bfloat16):
            features = model(image)
        if train:
            sum(feature.float().mean() for feature in features).backward()
    return counter


def by_operation(counter: Counter) -> dict[str, tuple[int, int, int]]:
    """Return launches, bytes and FLOPs by the name of the operation, most bytes first."""
    totals = collections.defaultdict(lambda: (0, 0, 0))
    for op in counter.operations:
        launches, moved, flops = totals[op.name]
        totals[op.name] = launches + op.launches, moved + op.bytes, flops + op.flops
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def costs(subject: Subject, setting: Setting, device: str) -> Record:
    """Count one step of a subject, with drop path in training.

    Args:
        subject: A model, in a given memory format.
        setting: Of it the mode, the size, the batch and the dtype count.
        device: A name of :data:`DEVICES`, for the times.
    """
    train = setting.mode == 'train'
    model = build_model(subject, drop_path_rate=DROP_PATH_RATE).to('meta')
    image = torch.empty(setting.batch, 3, *setting.size, device='meta')
    image = image.contiguous(memory_format=MEMORY_FORMATS[subject.memory_format])
    counter = count(model, image, train, setting.dtype == 'bfloat16')
    operations, bounds = counter.operations, DEVICES[device]
    launches = sum(op.launches for op in operations)
    return {
        'mode': setting.mode,
        'size': setting.shown_size,
        'model': subject.label,
        'launches': launches,
        'GB moved': sum(op.bytes for op in operations) / 1e9,
        'TFLOP': sum(op.flops for op in operations) / 1e12,
        'synchronizations': counter.synchronizations,
        'launching ms': 1e3 * launches * bounds.launch,
        'device ms': 1e3 * sum(op.seconds(bounds) for op in operations),
    }
