"""Networks with tensors in and out, built from mm models so that a graph can be captured.

Whatever mm heads do with Python lists, one image at a time, or with sizes that a graph would record
as constants, is rewritten here in ordinary torch, for any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.mmengine import converts_channels, normalizes

_LARGEST_GROWTH = math.log(1000 / 16)  # of a box's side over its anchor's, as in mmdet's coder


class UnsupportedModelError(ValueError):
    """A model, or a part of one, that cannot be exported as requested."""


class Preprocessing(nn.Module):
    """What mm's data preprocessor does to a batch in testing.

    Args:
        mean: Mean of each channel, after the channels were swapped.
        std: Standard deviation of each channel.
        swap: Whether to reverse the channels: BGR to RGB, or RGB to BGR.
        divisor: Images are padded on the right and at the bottom to multiples of this.
        pad_value: Value of the padding, after normalization.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        swap: bool,
        divisor: int = 1,
        pad_value: float = 0.0,
    ):
        super().__init__()
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.swap = swap
        self.divisor = divisor
        self.pad_value = pad_value

    def forward(self, images: Tensor) -> Tensor:
        """Normalize and pad.

        Args:
            images: (B, C, H, W) of any dtype.
        """
        images = images.flip(1) if self.swap else images
        images = (images.float() - self.mean) / self.std
        if self.divisor == 1:
            return images
        height, width = (-side % self.divisor for side in images.shape[-2:])
        return F.pad(images, (0, width, 0, height), value=self.pad_value)


class AnySizePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps of any size in one graph.

    Args:
        height: Rows of the output.
        width: Columns of the output.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height = height
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, height, width)."""
        rows = _pooling_matrix(self.height, x.shape[-2], x)
        columns = _pooling_matrix(self.width, x.shape[-1], x)
        return rows @ x @ columns.transpose(0, 1)


class AnySizeGroupNorm(nn.Module):
    """``nn.GroupNorm`` without its check of the map's size, on which a graph cannot depend.

    Args:
        norm: The norm whose weights it shares.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _pooling_matrix(out: int, size: int, like: Tensor) -> Tensor:
    """Return (out, size): row i averages from floor(i size / out) to ceil((i + 1) size / out)."""
    index = torch.arange(out, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)[None]
    start = index * size // out
    stop = ((index + 1) * size + out - 1) // out
    inside = (start <= position) & (position < stop)
    return inside.to(like.dtype) / (stop - start).to(like.dtype)


class Network(nn.Module):
    """Images in, tensors out.

    Args:
        model: A segmentor, a detector, or anything with a ``backbone``.
        preprocessing: Applied to the images first; None if they come preprocessed.

    Attributes:
        in_channels: Channels of the images.
        output_names: Names of the tensors that are returned.
        out_axes: Names of the dimensions of each.
    """

    in_axes = ('batch', 'channels', 'height', 'width')
    output_names: tuple[str, ...]
    out_axes: tuple[tuple[str, ...], ...]

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None = None):
        super().__init__()
        self.backbone = model.backbone
        self.neck = getattr(model, 'neck', None)
        self.preprocessing = preprocessing
        self.in_channels = next(
            layer.in_channels for layer in self.backbone.modules() if isinstance(layer, nn.Conv2d)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for images (B, C, H, W)."""
        size = images.shape[-2:]
        if self.preprocessing is not None:
            images = self.preprocessing(images)
        return self.outputs(images, size)

    def outputs(self, images: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the outputs.

        Args:
            images: Preprocessed, (B, C, H, W).
            size: Height and width of the images before they were padded.
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features that heads take, after the neck."""
        features = self.backbone(images)
        return features if self.neck is None else self.neck(features)


class Features(Network):
    """The features of the backbone, ``feature_0`` being those of the first stage."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None = None):
        super().__init__(model, preprocessing)
        self.neck = None
        indices = self.backbone.out_indices
        self.output_names = tuple(f'feature_{index}' for index in indices)
        self.out_axes = tuple(
            ('batch', 'channels', f'height_{index}', f'width_{index}') for index in indices
        )

    def outputs(self, images: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(self.features(images))


class Segmentor(Network):
    """An mmseg ``EncoderDecoder`` on whole images.

    ``logits`` are (B, classes, H, W), at the resolution of the images.
    """

    output_names = ('logits',)
    out_axes = (('batch', 'classes', 'height', 'width'),)

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None = None):
        super().__init__(model, preprocessing)
        self.head = model.decode_head

    def outputs(self, images: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        return (self.logits(images, size),)

    def logits(self, images: Tensor, size: Sequence[int]) -> Tensor:
        logits = F.interpolate(
            self.head(self.features(images)),
            images.shape[-2:],
            mode='bilinear',
            align_corners=self.head.align_corners,
        )
        return logits[..., : size[0], : size[1]]


class LabelMap(Segmentor):
    """A segmentor up to ``labels``, (B, H, W): the index of the class of every pixel."""

    output_names = ('labels',)
    out_axes = (('batch', 'height', 'width'),)

    def outputs(self, images: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        return (self._scores(self.logits(images, size)).argmax(1),)

    def _scores(self, logits: Tensor) -> Tensor:
        """Return scores whose argmax is the label; a single logit is compared with a threshold."""
        if logits.shape[1] > 1:
            return logits
        threshold = torch.full_like(logits, self.head.threshold)
        return torch.cat((threshold, logits.sigmoid()), 1)

    def shortfall(self, images: Tensor, labels: Tensor) -> float:
        """Return how far the logits of given labels are below the largest, in relative terms."""
        size = images.shape[-2:]
        if self.preprocessing is not None:
            images = self.preprocessing(images)
        scores = self._scores(self.logits(images, size))
        if labels.shape != scores[:, 0].shape:
            return float('inf')
        given = scores.gather(1, labels[:, None])
        return ((scores.amax(1, keepdim=True) - given).max() / scores.abs().max()).item()


class Detector(Network):
    """RetinaNet or ATSS up to the boxes and scores of all anchors, before nms.

    ``boxes`` are (B, anchors, 4): corners x1, y1, x2, y2 in pixels of the images, within them.
    ``scores`` are (B, anchors, classes), from 0 to 1. Those of ATSS are class score times
    centerness.
    """

    output_names = ('boxes', 'scores')
    out_axes = (('batch', 'anchors', 'corners'), ('batch', 'anchors', 'classes'))

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None = None):
        super().__init__(model, preprocessing)
        self.head = model.bbox_head
        coder = self.head.bbox_coder
        self.clips = coder.clip_border
        for name in ('means', 'stds'):
            self.register_buffer(name, torch.tensor(getattr(coder, name)), persistent=False)
        generator = self.head.prior_generator
        self.strides = [tuple(stride) for stride in generator.strides]  # of x and of y
        for level, anchors in enumerate(generator.base_anchors):
            self.register_buffer(f'anchors_{level}', anchors.float(), persistent=False)

    def outputs(self, images: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        maps = self.head(self.features(images))
        levels = [self._level(level, *maps) for level, maps in enumerate(zip(*maps))]
        anchors, deltas, scores = (torch.cat(parts, -2) for parts in zip(*levels))
        return self._decode(anchors, deltas, size), scores

    def _level(
        self, level: int, classes: Tensor, deltas: Tensor, centerness: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return anchors (N, 4), deltas (B, N, 4) and scores (B, N, classes) of a level."""
        anchors = self._anchors(level, *classes.shape[-2:])
        scores = _by_anchor(classes, self.head.cls_out_channels)
        scores = scores.sigmoid() if self.head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        if centerness is not None:
            scores = scores * _by_anchor(centerness, 1).sigmoid()
        return anchors, _by_anchor(deltas, 4), scores

    def _anchors(self, level: int, height: int, width: int) -> Tensor:
        base = getattr(self, f'anchors_{level}')
        stride_x, stride_y = self.strides[level]
        x = torch.arange(width, device=base.device).to(base.dtype) * stride_x
        y = torch.arange(height, device=base.device).to(base.dtype) * stride_y
        y, x = torch.meshgrid(y, x, indexing='ij')
        return (torch.stack((x, y, x, y), -1)[:, :, None] + base).reshape(-1, 4)

    def _decode(self, anchors: Tensor, deltas: Tensor, size: Sequence[int]) -> Tensor:
        """Apply deltas to anchors, as mmdet's ``DeltaXYWHBBoxCoder`` does."""
        shift, growth = (deltas * self.stds + self.means).split(2, -1)
        growth = growth.clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH)
        sides = anchors[:, 2:] - anchors[:, :2]
        center = (anchors[:, :2] + anchors[:, 2:]) / 2 + sides * shift
        half = sides * growth.exp() / 2
        x1, y1, x2, y2 = torch.cat((center - half, center + half), -1).unbind(-1)
        if self.clips:
            x1, x2 = (x.clamp(0, size[1]) for x in (x1, x2))
            y1, y2 = (y.clamp(0, size[0]) for y in (y1, y2))
        return torch.stack((x1, y1, x2, y2), -1)


def _by_anchor(x: Tensor, channels: int) -> Tensor:
    """Rearrange a map (B, anchors * channels, H, W) as (B, H * W * anchors, channels)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


#: What a graph may return.
OUTPUTS: dict[str, type[Network]] = {
    'features': Features,
    'logits': Segmentor,
    'labels': LabelMap,
    'boxes': Detector,
}


def make_network(model: nn.Module, output: str | None = None, preprocess: bool = False) -> Network:
    """Make the network of a model from which a graph is captured.

    Args:
        model: A segmentor, a detector, or, for 'features', anything with a ``backbone``.
        output: A key of :data:`OUTPUTS`; by default 'logits' of a segmentor and 'boxes' of others.
        preprocess: Whether the network includes the model's data preprocessor.

    Raises:
        UnsupportedModelError: If the model cannot produce that output, or its data preprocessor
            does what a graph cannot; the message says what is possible.
        ValueError: If there is no such output.
    """
    if output is None:
        output = 'logits' if hasattr(model, 'decode_head') else 'boxes'
    if output not in OUTPUTS:
        raise ValueError(f'output must be one of {", ".join(OUTPUTS)}, got {output!r}')
    if output in ('logits', 'labels'):
        _check_segmentor(model, output)
    elif output == 'boxes':
        _check_detector(model)
    elif not hasattr(model.backbone, 'out_indices'):
        raise UnsupportedModelError(f'{type(model.backbone).__name__} has no out_indices')
    if getattr(model.backbone, 'norm', None) == 'bn':
        raise UnsupportedModelError(
            "a backbone with norm='bn' has constants for every position of one size of image: "
            'export it at that size, as docs/fully_polynomial.md shows'
        )
    preprocessing = _preprocessing(model) if preprocess else None
    return OUTPUTS[output](model, preprocessing).eval()


def _check_segmentor(model: nn.Module, output: str) -> None:
    what = f'{output} of {type(model).__name__}'
    if not hasattr(model, 'decode_head'):
        raise UnsupportedModelError(
            f'{what}: it is no segmentor; a detector gives boxes or features'
        )
    from mmseg.models import EncoderDecoder
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = model.decode_head
    if type(model) is not EncoderDecoder or not isinstance(head, BaseDecodeHead):
        raise UnsupportedModelError(
            f'{what}: of segmentors, EncoderDecoder with one decode head can be exported; '
            'features can be of any'
        )
    for method in ('predict', 'predict_by_feat'):
        if getattr(type(head), method) is not getattr(BaseDecodeHead, method):
            raise UnsupportedModelError(
                f'{what}: {type(head).__name__} has its own way of making logits ({method}); '
                "heads can be exported that leave this to mmseg's BaseDecodeHead, such as "
                'UPerHead, '
                'PSPHead and FCNHead; features can be of any'
            )


def _check_detector(model: nn.Module) -> None:
    head = getattr(model, 'bbox_head', None)
    name = type(model).__name__ if head is None else type(head).__name__
    if name not in ('RetinaHead', 'ATSSHead'):
        raise UnsupportedModelError(
            f'boxes of {name}: of detectors, those with RetinaHead or ATSSHead (RetinaNet, ATSS) '
            'can be exported; features can be of any'
        )
    for part, kind in (
        (head.bbox_coder, 'DeltaXYWHBBoxCoder'),
        (head.prior_generator, 'AnchorGenerator'),
    ):
        if type(part).__name__ != kind:
            raise UnsupportedModelError(
                f'boxes of {name} with {type(part).__name__}: with {kind} it can be exported'
            )
    if head.bbox_coder.add_ctr_clamp or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise UnsupportedModelError(
            f'boxes of {name} with add_ctr_clamp, or with a loss that activates the classes, '
            'cannot be exported; features can be of any'
        )


def _preprocessing(model: nn.Module) -> Preprocessing:
    """Return what the model's data preprocessor does in testing."""
    settings: Any = model.data_preprocessor
    if not normalizes(settings):
        raise UnsupportedModelError(
            f'{type(settings).__name__} has no mean and std: export without preprocessing'
        )
    if hasattr(settings, 'size_divisor'):  # mmseg's, which pads in testing only if told to
        padding = settings.test_cfg or {}
        pad_value = settings.pad_val
    else:
        padding = dict(size_divisor=settings.pad_size_divisor)
        pad_value = settings.pad_value
    if padding.get('size') is not None:
        raise UnsupportedModelError(
            'the data preprocessor pads to a fixed size in testing: '
            'export without preprocessing, or set size_divisor in its test_cfg'
        )
    return Preprocessing(
        settings.mean.flatten().tolist(),
        settings.std.flatten().tolist(),
        converts_channels(settings),
        padding.get('size_divisor') or 1,
        float(pad_value),
    )
