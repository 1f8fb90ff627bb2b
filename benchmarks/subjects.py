"""What is benchmarked: models and attention, found by name, and one step of each."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import exported
import segmentors
from polynext_mm.nn import ARCHS, PolyNeXt, poly_attention
from polynext_mm.nn.ops.poly_attention import plain as plain_attention
from polynext_mm.nn.plain import PlainPolyNeXt
from polynext_mm.weights.names import translate_back

# The modifiers that each kind of model takes, and the memory format of its images. None: a timm
# model runs in either format, and the faster one counts.
MODIFIERS = {
    'ours': ('fuse', 'compile', 'cp', 'graph'),
    'plain': ('compile', 'graph'),
    'timm': ('compile', 'graph'),
    'uper': (),
    **dict.fromkeys(exported.PROGRAMS, ()),
}
KIND_FORMATS = {
    'ours': 'channels_last',
    'plain': 'contiguous',
    'timm': None,
    'uper': None,
    **dict.fromkeys(exported.PROGRAMS, 'contiguous'),
}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DEVICES = ('cpu', 'cuda', 'xpu', 'mps')
DTYPES = {name: getattr(torch, name) for name in ('float32', 'bfloat16', 'float16')}

# Attention alone, with the heads of the third stage of the S archs.
ATTENTION = {'blocks': poly_attention, 'matrix': plain_attention}
HEADS, HEAD_WIDTH = 5, 32


def check_device(device: str) -> None:
    """Check that there is a device of a kind.

    Raises:
        ValueError: If torch finds none.
    """
    if device == 'cpu':
        return
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None or accelerator.type != device:
        raise ValueError(f'torch finds no {device} device: use --device cpu')


@dataclasses.dataclass(frozen=True)
class Setting:
    """The conditions of a measurement.

    Args:
        mode: 'inference', or 'train' for forward and backward without an optimizer.
        size: (H, W) of the images, or (tokens,) for attention.
        batch: Images per step.
        dtype: A key of DTYPES. Half types are by autocast, for attention alone by its inputs.
        device: Of DEVICES, or 'meta', which computes nothing.
        threads: CPU threads.
    """

    mode: str
    size: tuple[int, ...]
    batch: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    threads: int = 1

    @property
    def shown_size(self) -> str:
        return 'x'.join(map(str, self.size))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model or a form of attention.

    Args:
        label: The name in the report.
        kind: 'ours', 'plain', 'timm', 'uper', 'attention', or a program that runs an exported
            graph of ours.
        name: An arch, a timm model, a backbone of segmentors.py or a key of ATTENTION.
        memory_format: A key of MEMORY_FORMATS, or None for the faster one.
        modifiers: Some of MODIFIERS[kind].
    """

    label: str
    kind: str
    name: str
    memory_format: str | None = None
    modifiers: tuple[str, ...] = ()

    def variants(self) -> list[Subject]:
        """Return the subject in every memory format that it may run in."""
        formats = [self.memory_format] if self.memory_format else MEMORY_FORMATS
        return [dataclasses.replace(self, memory_format=name) for name in formats]


@dataclasses.dataclass
class Workload:
    """A step to measure, and the bytes of weights or inputs that exist before it runs."""

    step: Callable[[], None]
    held: int


def parse_subject(label: str) -> Subject:
    """Parse a label: a model, with any ``+MODIFIER`` last.

    A model is ``ARCH``, ``plain:ARCH``, ``timm:NAME[:MEMORY_FORMAT]``,
    ``uper:BACKBONE[:MEMORY_FORMAT]``, ``onnxruntime:ARCH`` or ``openvino:ARCH``.

    Raises:
        ValueError: For an unknown kind, name, memory format or modifier, naming the valid ones.
    """
    model, *modifiers = label.split('+')
    kind, name, *rest = model.split(':') if ':' in model else ('ours', model)
    if kind not in MODIFIERS:
        raise ValueError(
            f'{label}: unknown kind of model {kind!r}: write ARCH, plain:ARCH, timm:NAME, '
            f'uper:BACKBONE, onnxruntime:ARCH or openvino:ARCH, where ARCH is one of '
            f'{", ".join(ARCHS)}'
        )
    names = segmentors.BACKBONES if kind == 'uper' else tuple(ARCHS)
    if kind == 'timm':
        _check_timm(label, name)
    elif name not in names:
        raise ValueError(f'{label}: unknown arch {name!r}: choose one of {", ".join(names)}')
    if kind in exported.PROGRAMS and importlib.util.find_spec(kind) is None:
        raise ValueError(f'{label} needs {kind}: pip install {kind}')
    if rest and KIND_FORMATS[kind] is not None:
        raise ValueError(f'{label}: only timm: and uper: models take a memory format')
    if rest and (len(rest) > 1 or rest[0] not in MEMORY_FORMATS):
        raise ValueError(f'{label}: after the name write :{" or :".join(MEMORY_FORMATS)}')
    for modifier in modifiers:
        if modifier not in MODIFIERS[kind]:
            raise ValueError(
                f'{label}: unknown modifier +{modifier}: {kind} models take '
                f'{", ".join(f"+{name}" for name in MODIFIERS[kind]) or "none"}'
            )
    memory_format = rest[0] if rest else KIND_FORMATS[kind]
    return Subject(label, kind, name, memory_format, tuple(modifiers))


def _check_timm(label: str, name: str) -> None:
    try:
        import timm
    except ImportError:
        raise ValueError(f'{label} needs timm: pip install timm') from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f': did you mean {", ".join(close)}?' if close else ''
        raise ValueError(f'{label}: timm has no model {name!r}{hint}')


def build_model(subject: Subject, drop_path_rate: float = 0.0) -> nn.Module:
    """Return a model that maps images to a list of features, initialized from scratch.

    Args:
        subject: Of any kind but 'attention'.
        drop_path_rate: Of the last cell or block; plain models have no drop path.
    """
    if subject.kind == 'timm':
        import timm

        model = timm.create_model(subject.name, features_only=True, drop_path_rate=drop_path_rate)
        model = model.to(memory_format=MEMORY_FORMATS[subject.memory_format])
    else:
        model = PolyNeXt(
            subject.name, drop_path_rate=drop_path_rate, with_cp='cp' in subject.modifiers
        )
    if subject.kind == 'plain':
        weights = translate_back(model.state_dict(), model.arch)
        model = PlainPolyNeXt(subject.name)
        model.load_state_dict(weights)
    if 'fuse' in subject.modifiers:
        model.fuse()
    if 'compile' in subject.modifiers:
        _compile(model)
    return model


def _compile(model: nn.Module) -> None:
    """Compile our cells for any size, and any other model as a whole for one size at a time."""
    # Beyond the limit code runs uncompiled, silently.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if isinstance(model, PolyNeXt):
        model.compile_cells()
    else:
        model.compile(dynamic=False)


def make_workload(subject: Subject, setting: Setting) -> Workload:
    """Build a subject and its input, and run nothing yet.

    Raises:
        RuntimeError: If memory runs out.
    """
    torch.manual_seed(0)
    if subject.kind == 'attention':
        return _attention_workload(subject, setting)
    if subject.kind in exported.PROGRAMS:
        return _exported_workload(subject, setting)
    if subject.kind == 'uper':
        model = segmentors.build(subject.name)
        model = model.to(memory_format=MEMORY_FORMATS[subject.memory_format])
    else:
        model = build_model(subject)
    model.to(setting.device).train(setting.mode == 'train')
    step = make_step(model, setting, subject.memory_format)
    run = _captured(step) if 'graph' in subject.modifiers else step
    return Workload(run, _bytes([*model.parameters(), *model.buffers()]))


def make_step(model: nn.Module, setting: Setting, memory_format: str) -> Callable[[], None]:
    """Return a step of a model that is on the device and in the mode of a setting.

    Args:
        model: Maps images to features or logits, whose means are the loss, or is a segmentor.
        setting: A segmentor trains on two images or more: its batch norms see maps of one pixel.
        memory_format: Of the images, a key of MEMORY_FORMATS.
    """
    images = torch.randn(setting.batch, 3, *setting.size, device=setting.device)
    images = images.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    train = setting.mode == 'train'
    forward = segmentors.forward(model, images, train) if hasattr(model, 'decode_head') else model

    def step():
        with torch.set_grad_enabled(train), autocast(setting):
            outputs = forward(images)
        if train:
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            sum(output.float().mean() for output in outputs).backward()
            model.zero_grad(set_to_none=True)

    return step


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Record what a step launches on a GPU, to launch it at once: the host's time is left out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are tuned and memory is allocated before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keeping_alive=step):  # the graph reads its tensors
        graph.replay()

    return replay


def _exported_workload(subject: Subject, setting: Setting) -> Workload:
    path = exported.onnx_file(subject.name)
    run = exported.load(subject.kind, path, setting.threads)
    images = torch.randn(setting.batch, 3, *setting.size).numpy()
    return Workload(lambda: run(images), path.stat().st_size)


def _attention_workload(subject: Subject, setting: Setting) -> Workload:
    """Return forward and backward of one attention layer, which holds q, k and v."""
    attend = ATTENTION[subject.name]
    shape = (setting.batch, HEADS, *setting.size, HEAD_WIDTH)
    inputs = [
        torch.randn(shape, device=setting.device).to(DTYPES[setting.dtype]).requires_grad_()
        for _ in 'qkv'
    ]

    def step():
        q, k, v = inputs
        attend(q * HEAD_WIDTH**-0.5, k, v).float().mean().backward()
        for tensor in inputs:
            tensor.grad = None

    return Workload(step, _bytes(inputs))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def autocast(setting: Setting) -> contextlib.AbstractContextManager:
    """Return what a forward pass of a setting runs under."""
    if setting.dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(setting.device, DTYPES[setting.dtype])
