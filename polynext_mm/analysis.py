"""Parameters and multiply-adds of a network, without computing anything.

The network runs once on the meta device, which has shapes but no values, under torch's
FlopCounterMode. That counts convolutions, matrix products, attention however it is computed, and
this package's operators by their own formulas. By convention, elementwise operations, norms,
pooling and resizing are not counted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .compat.torch_features import CUSTOM_OPERATORS, no_fused_attention_layers
from .nn import plain_ops

# operators without a formula in torch's counter, if this torch has them
_FORMULAS = {
    getattr(torch.ops.aten, name): (
        lambda q_shape, k_shape, v_shape, *_, **__: sdpa_flop_count(q_shape, k_shape, v_shape)
    )
    for name in ('_scaled_dot_product_flash_attention_for_cpu',)
    if hasattr(torch.ops.aten, name)
}
# RoI heads that run as counted here: each head once, on all of its regions.
_ROI_HEADS = ('StandardRoIHead', 'CascadeRoIHead')
_MASKED_REGIONS = 100


class NeedsValuesError(RuntimeError):
    """A model does not run on the meta device; ``reason`` says which model and why."""

    def __init__(self, reason: str):
        super().__init__(f'{reason}: set the device to cpu')
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Part:
    """A module's share.

    Args:
        parameters: Number of parameters, children included.
        macs: Multiply-adds while the module runs, children included. If only its children are
            called, the sum of theirs; None if none is.
    """

    parameters: int
    macs: int | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a network costs in inference.

    Args:
        shape: Of the image, (channels, H, W).
        parameters: Number in the whole network, including heads that only train.
        macs: Multiply-adds for one image: what papers of this field call MACs, and often FLOPs.
        parts: The share of each module, by its name, outer ones first.
    """

    shape: tuple[int, int, int]
    parameters: int
    macs: int
    parts: dict[str, Part]

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-add."""
        return 2 * self.macs


def count(
    model: nn.Module, shape: Sequence[int], run: Callable[[Tensor], Any] | None = None
) -> Cost:
    """Count what a network costs on one image, on the device where it is.

    Args:
        model: The network, which is put into eval mode. On the meta device counting is instant;
            elsewhere the network is computed.
        shape: Of the image, (channels, H, W).
        run: Inference on a batch of images; ``model(images)`` by default.
    """
    model = model.eval()
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # without operators, the counter would see the internals of kernels
    ops = contextlib.nullcontext() if CUSTOM_OPERATORS.is_there else plain_ops()
    with device, ops, no_fused_attention_layers(), _spending(model, counter) as flops, counter:
        (run or model)(torch.zeros(1, *shape, requires_grad=torch.is_grad_enabled()))

    def macs(module: nn.Module, name: str) -> int | None:
        if name in flops:
            return flops[name] // 2
        children = [macs(child, f'{name}.{key}') for key, child in module.named_children()]
        return None if set(children) <= {None} else sum(filter(None, children))

    parts = {
        name: Part(_parameters(module), macs(module, name))
        for name, module in model.named_modules()
        if name
    }
    channels, height, width = shape
    return Cost(
        (channels, height, width), _parameters(model), counter.get_total_flops() // 2, parts
    )


@contextlib.contextmanager
def _spending(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Yield a dict that collects what every called module spends, by its name."""
    flops: dict[str, int] = {}
    before: list[int] = []

    def watch(name: str, module: nn.Module) -> None:
        def leave(*_: Any) -> None:
            flops[name] = flops.get(name, 0) + counter.get_total_flops() - before.pop()

        stack.callback(
            module.register_forward_pre_hook(
                lambda *_: before.append(counter.get_total_flops())
            ).remove
        )
        stack.callback(module.register_forward_hook(leave).remove)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            watch(name, module)
        yield flops


def _parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def count_config(config: Any, shape: Sequence[int] | None = None, device: str = 'meta') -> Cost:
    """Count what the model of a config costs.

    A segmentor is counted as it segments a whole image, without the heads that only train; a
    two-stage detector with the number of regions that its ``test_cfg`` allows, and 100 masks.

    Args:
        config: An ``mmengine.Config`` of a segmentor, a detector or a bare backbone.
        shape: H and W of the image; None for :func:`default_shape`.
        device: 'meta', or 'cpu' for a model whose forward pass depends on values.

    Raises:
        ValueError: For a detector in two stages whose heads are not counted here.
        NeedsValuesError: If the forward pass needs values and the device is 'meta'.
    """
    model = build_model(config, device)
    height, width = shape or default_shape(model)
    channels = config.model.get('backbone', config.model).get('in_channels', 3)
    try:
        return count(model, (channels, height, width), _inference(model, (height, width)))
    except (NotImplementedError, RuntimeError) as error:
        if device != 'meta':
            raise
        raise NeedsValuesError(
            f'{type(model).__name__} does not run on the meta device, which has no values '
            f'({type(error).__name__}: {str(error).splitlines()[0]})'
        ) from error


def default_shape(model: nn.Module) -> tuple[int, int]:
    """Return the H and W at which papers count.

    These are 512x2048 for segmentors, 800x1280 for detectors, and 224x224 for backbones.
    """
    if hasattr(model, 'decode_head'):
        return 512, 2048
    return (800, 1280) if hasattr(model, 'extract_feat') else (224, 224)


def build_model(config: Any, device: str) -> nn.Module:
    """Build the model of a config, without loading weights and for inference alone."""
    from mmengine.registry import MODELS, init_default_scope

    scope = config.get('default_scope')
    if scope:
        importlib.import_module(f'{scope}.models')
        init_default_scope(scope)
    # built on the CPU, since drop-path rates, for example, are often read from a tensor
    # some models, such as DINO, write into the settings that they are given
    return MODELS.build(copy.deepcopy(config.model)).to(device).requires_grad_(False)


def _inference(model: Any, size: tuple[int, int]) -> Callable[[Tensor], Any]:
    """Return a function that does inference for one image, without its postprocessing."""
    meta = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
    )
    if hasattr(model, 'decode_head'):
        return lambda images: model.encode_decode(images, [meta])
    if hasattr(model, 'roi_head'):
        return lambda images: _detect_in_two_stages(model, images)
    if hasattr(model, 'extract_feat'):
        from mmdet.structures import DetDataSample

        return lambda images: model(images, [DetDataSample(metainfo=meta)], mode='tensor')
    return model


def _detect_in_two_stages(model: Any, images: Tensor) -> None:
    """Run a detector's parts on the largest number of regions it may propose."""
    roi_head = model.roi_head
    kind = type(roi_head).__name__
    if kind not in _ROI_HEADS or roi_head.with_shared_head:
        raise ValueError(
            f'the heads of {type(model).__name__} ({kind}) are not counted here: of detectors in '
            f'two stages, those with {" or ".join(_ROI_HEADS)} are'
        )
    model.rpn_head(model.extract_feat(images))
    regions = model.test_cfg.rpn.max_per_img
    heads = [('bbox', regions)]
    if roi_head.with_mask:
        heads.append(('mask', min(regions, _MASKED_REGIONS)))
    for name, number in heads:
        extractor = getattr(roi_head, f'{name}_roi_extractor')
        head = getattr(roi_head, f'{name}_head')
        cascade = isinstance(head, nn.ModuleList)
        for extract, predict in zip(extractor, head) if cascade else [(extractor, head)]:
            size = extract.roi_layers[0].output_size
            predict(images.new_zeros(number, extract.out_channels, *size))


def table(cost: Cost, depth: int = 1) -> str:
    """Lay out the parts of a cost, one line for each module.

    Args:
        cost: Of the network.
        depth: Depth of names: 1 for the network's own parts, 2 for theirs as well, and so on.
    """
    parts = {name: part for name, part in cost.parts.items() if name.count('.') < depth}
    rows = [*parts.items(), ('total', Part(cost.parameters, cost.macs))]
    width = max(len('module'), *(len(name) for name, _ in rows))
    lines = [f'{"module":<{width}} {"parameters, M":>14} {"MACs, G":>10} {"share":>7}']
    for name, part in rows:
        line = f'{name:<{width}} {part.parameters / 1e6:>14.3f}'
        if part.macs is not None:
            line += f' {part.macs / 1e9:>10.3f} {part.macs / max(cost.macs, 1):>7.1%}'
        lines.append(line)
    return '\n'.join(lines)
