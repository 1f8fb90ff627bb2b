"""Capture a graph of a network for all sizes, write it in three formats, run and compare it."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..compat.torch_features import EXPORT
from ..nn.compiling import require_compiler
from .networks import AnySizeGroupNorm, AnySizePool, LabelMap, Network

#: Sides of images that a graph takes.
SIDES = (32, 1 << 14)
LARGEST_BATCH = 1 << 10
#: Largest difference between a graph and torch, over the largest magnitude of an output.
TOLERANCE = 1e-4

# Batch, height and width while a graph is captured, without and with hints. With hints, no map may
# have a single row or column. Without, the numbers do not matter.
_EXAMPLES = ((2, 97, 130), (2, 1030, 1550))
_AXES = ('batch', 'height', 'width')

Run = Callable[[Tensor], list[Tensor]]


class ExportError(RuntimeError):
    """A graph cannot be captured, written or run here, or its outputs are wrong."""


class Format(NamedTuple):
    """A format of files.

    Args:
        suffix: Suffix of the files.
        with_hints: As for :func:`capture`.
        require: Raises an ExportError if something needed to write it is not installed.
        write: Writes a program of a network to a path, with metadata.
        consumer: What runs the files here.
        install: The command that installs the consumer, if it is not torch.
        open: Returns a function from images to outputs.
    """

    suffix: str
    with_hints: bool
    require: Callable[[], None]
    write: Callable[[ExportedProgram, Network, Path, dict], None]
    consumer: str
    install: str | None
    open: Callable[[Path], Run]


def fused(network: Network) -> Network:
    """Return a copy of a network in eval mode with weights folded and layers for any size.

    Gates and scales of the backbone, and batch norms after convolutions, become part of the
    neighbouring weights.
    """
    from mmcv.cnn import fuse_conv_bn

    network = copy.deepcopy(network).eval().requires_grad_(False)
    if hasattr(network.backbone, 'fuse'):
        network.backbone.fuse()
    with torch.no_grad():
        fuse_conv_bn(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                size = child.output_size
                height, width = (size, size) if isinstance(size, int) else size
                setattr(module, name, AnySizePool(height, width))
            elif isinstance(child, nn.GroupNorm):
                setattr(module, name, AnySizeGroupNorm(child))
    return network


def random_images(network: Network, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return images of the dtype that the network takes: uint8 if it does its own preprocessing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, network.in_channels, height, width)
    if network.preprocessing is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def capture(network: Network, with_hints: bool = False) -> ExportedProgram:
    """Return the graph of a network for any batch, height and width.

    Args:
        network: As :func:`fused` returns it.
        with_hints: With False, sizes are symbols without a value during capture, so none becomes a
            constant and no branch depends on one. AOTInductor needs values; with True they are
            those of a large image.

    Raises:
        ExportError: If this torch cannot do it, or the network depends on a size in a way that a
            graph cannot.
    """
    if not EXPORT.is_there:
        raise ExportError(f'{EXPORT.what_is_missing()}: upgrade torch')
    batch, *size = _EXAMPLES[with_hints]
    images = torch.empty(batch, network.in_channels, *size)
    if network.preprocessing is not None:
        images = images.byte()
    shapes = _hinted_shapes() if with_hints else _unhinted_shapes(network.in_channels)
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=shapes)
    except Exception as error:  # errors of many kinds with one meaning to the user
        raise ExportError(
            f'no graph for every size can be captured of this model: {_first_line(error)}'
        ) from error


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), '')
    return f'{type(error).__name__}: {line}'


def _hinted_shapes() -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    return {'images': {0: dynamic, 2: dynamic, 3: dynamic}}


def _unhinted_shapes(channels: int) -> Any:
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    limits = ((1, LARGEST_BATCH), SIDES, SIDES)
    batch, height, width = (
        ShapeVar(name, min=low, max=high) for name, (low, high) in zip(_AXES, limits)
    )
    spec = TensorSpec([batch, channels, height, width])
    return ShapesSpec(params=ParamsSpec({'images': spec}))


# ONNX


def _require_onnx() -> None:
    _require_packages('onnx', 'onnxscript')


def _write_onnx(program: ExportedProgram, network: Network, path: Path, metadata: dict) -> None:
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=['images'],
        output_names=list(network.output_names),
    )
    graph = onnx_program.model.graph
    for value, axes in zip((*graph.inputs, *graph.outputs), (network.in_axes, *network.out_axes)):
        value.shape = type(value.shape)(
            [dim if isinstance(dim, int) else axis for dim, axis in zip(value.shape, axes)]
        )
    onnx_program.model.metadata_props.update(
        {key: json.dumps(value) for key, value in metadata.items()}
    )
    onnx_program.save(path, external_data=False)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: [
        torch.from_numpy(output) for output in session.run(None, {'images': images.numpy()})
    ]


# Programs of torch


def _write_program(program: ExportedProgram, network: Network, path: Path, metadata: dict) -> None:
    files = {f'{key}.json': json.dumps(value) for key, value in metadata.items()}
    torch.export.save(program, path, extra_files=files)


def _open_program(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: list(module(images))


def _require_compiler() -> None:
    try:
        require_compiler('AOTInductor')
    except RuntimeError as error:
        raise ExportError(str(error)) from None


def _write_compiled(program: ExportedProgram, network: Network, path: Path, metadata: dict) -> None:
    settings = {'aot_inductor.metadata': {k: json.dumps(v) for k, v in metadata.items()}}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=settings
    )


def _open_compiled(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: list(package(images))


def _require_packages(*names: str) -> None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ExportError(
            f'{" and ".join(absent)} must be installed: pip install {" ".join(absent)}'
        )


FORMATS = {
    'onnx': Format(
        '.onnx',
        False,
        _require_onnx,
        _write_onnx,
        'onnxruntime',
        'pip install onnxruntime',
        _open_onnx,
    ),
    'pt2': Format('.pt2', False, lambda: None, _write_program, 'torch', None, _open_program),
    'aot': Format('.pt2', True, _require_compiler, _write_compiled, 'torch', None, _open_compiled),
}


def write_file(
    form: Format, program: ExportedProgram, network: Network, path: Path, metadata: dict
) -> None:
    """Write a program in a format.

    Raises:
        ExportError: If the format cannot hold it.
    """
    try:
        form.write(program, network, path, metadata)
    except Exception as error:
        raise ExportError(f'{path.name} cannot be written: {_first_line(error)}') from error


def open_file(form: Format, path: Path) -> Run:
    """Return a function from images to outputs that runs a file.

    Raises:
        ExportError: If the consumer of the format rejects the file.
    """
    try:
        return form.open(path)
    except Exception as error:
        raise ExportError(
            f'{form.consumer} cannot run {path.name}: {_first_line(error)}'
        ) from error


# Comparing


def difference(network: Network, images: Tensor, outputs: Sequence[Tensor]) -> float:
    """Return the largest difference of outputs from the network's, over the latter's magnitude.

    Labels are discrete, so they are compared by logits: by how much the network's logit of a given
    label is below its largest.

    Args:
        network: The network, run by torch.
        images: (B, C, H, W).
        outputs: Outputs of a graph of the network for these images.
    """
    with torch.no_grad():
        if isinstance(network, LabelMap):
            return network.shortfall(images, outputs[0])
        expected = network(images)
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return float('inf')
    differences = [
        (x - y).abs().max() / y.abs().max().clamp_min(1e-12) for x, y in zip(outputs, expected)
    ]
    return torch.stack(differences).max().item()  # nan if one is


def check(
    network: Network, run: Run, shapes: Sequence[tuple[int, int, int]], name: str
) -> list[float]:
    """Compare a graph with its network on random images; return the difference of each shape.

    Args:
        network: The network before :func:`fused`, run by torch.
        run: The graph.
        shapes: Batch, height and width of the images.
        name: Name of the graph, for messages.

    Raises:
        ExportError: If the graph fails, or a difference is above :data:`TOLERANCE`.
    """
    found = []
    for seed, shape in enumerate(shapes):
        images = random_images(network, *shape, seed)
        where = 'x'.join(map(str, shape))
        try:
            outputs = run(images)
        except Exception as error:
            raise ExportError(f'{name} fails on images of {where}: {error}') from error
        found.append(difference(network, images, outputs))
        if not found[-1] <= TOLERANCE:
            raise ExportError(
                f'{name} differs from torch by {found[-1]:.1e} of the largest value on images of '
                f'{where}, which is more than {TOLERANCE:.0e}'
            )
    return found
