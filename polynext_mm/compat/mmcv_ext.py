"""A stand-in for ``mmcv._ext``, the compiled extension behind ``mmcv.ops``.

:func:`polynext_mm.compat.install_mmcv_ops` loads this file under the name ``mmcv._ext``. Operators
and their arguments are named as in the compiled extension, and most results are likewise written
into tensors that the caller passes in. The operators that detectors and segmentors need for
training and prediction are built from torchvision's kernels and plain torch, and run on any device
that these support. Every other operator exists too, so that ``mmcv.ops`` can be imported, and
raises ``NotImplementedError`` when it is called.

Everything is computed in float32, or in float64 for float64 input: mixed precision passes in
float16 and bfloat16 tensors, which not all of torchvision's kernels take. All dtypes are explicit,
so that autocast does not change a result.

One difference remains: under ``torch.use_deterministic_algorithms(True)`` the backward passes of
RoIAlign and deformable attention raise on a GPU, where mmcv's kernels carry on regardless.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from polynext_mm.compat.packages import how_to_compile_mmcv
from polynext_mm.compat.torch_features import matching_torchvision

#: Why the compiled extension could not be imported; set by ``install_mmcv_ops``.
why_missing = 'mmcv._ext was not tried'

# The smallest positive normal float32, to which the focal losses clamp before taking a logarithm.
_SMALLEST = torch.finfo(torch.float32).tiny

# What mmcv's CPU kernel returns for a region too small to hold a sampling point.
_MAX_OF_NOTHING = -10000.0


def __getattr__(name: str) -> Callable:
    """Return a placeholder for an operator without a stand-in: calling it raises."""
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*_args: object, **_named: object) -> None:
        raise NotImplementedError(
            f"mmcv's operator {name!r} needs mmcv's compiled extension, which is not there "
            f'({why_missing}), and polynext_mm has no stand-in for it: '
            f'compile mmcv with `{how_to_compile_mmcv()}`'
        )

    missing.__name__ = name
    return missing


@functools.cache
def _announce() -> None:
    """Log which implementation is in use, once, when the first operator is called."""
    print_log(
        f"mmcv's compiled operators cannot be imported ({why_missing}); polynext_mm runs them on "
        f'torchvision {metadata.version("torchvision")} and torch {torch.__version__}.',
        logger='current',
    )


@functools.cache
def _torchvision() -> ModuleType:
    """Import torchvision, which takes a second, when an operator first needs it.

    Its import calls an operator that ``torch.jit.trace`` cannot record. Tracing is per thread, so
    the import runs in another one.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(importlib.import_module, 'torchvision').result()
    except ModuleNotFoundError as error:
        if error.name != 'torchvision':
            raise
        raise ImportError(
            "the operators that stand in for mmcv's compiled ones need torchvision, which is not "
            f"installed: run `pip install '{matching_torchvision()}'`",
            name='torchvision',
        ) from error


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------
# Environment
# ------------------------------------------------------------------------------------------------


def get_compiler_version() -> str:
    """Return what a report of the environment shows as the compiler's version."""
    return f'not compiled (polynext_mm on torchvision {metadata.version("torchvision")})'


def get_compiling_cuda_version() -> str:
    """Return what a report of the environment shows as CUDA's version."""
    return get_compiler_version()


# ------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Keep the boxes that overlap no box of a higher score by more than a threshold.

    Args:
        boxes: Corners x1, y1, x2, y2, in shape (N, 4).
        scores: In shape (N,). Among equal scores the one that ``torch.sort`` puts first is higher.
        iou_threshold: Largest overlap, as intersection over union, that is still kept.
        offset: 0, or 1 for boxes that include the pixels at their corners, so that a width is
            x2 - x1 + 1.

    Returns:
        Indices of the boxes kept, by descending score, int64 in shape (K,).
    """
    ops = _torchvision().ops
    _announce()
    boxes = boxes.float()
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # mmcv compares in float32 and torchvision with a float64 threshold, which matters for boxes
    # that overlap by exactly the threshold: 0.6 is larger in float32 than in float64.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32, device='cpu').item()
    # mmcv's sort is not stable and torchvision's is, so equal scores are put in mmcv's order here.
    order = scores.sort(descending=True).indices
    ranks = torch.arange(len(order), 0, -1, dtype=torch.float32, device=order.device)
    return order[ops.nms(boxes[order], ranks, threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap a box of a higher score.

    Args:
        boxes: Corners x1, y1, x2, y2, in shape (N, 4).
        scores: In shape (N,).
        dets: Output in shape (N, 5): the K boxes kept and their new scores, by descending score,
            in the first K rows.
        iou_threshold: Overlap from which methods 0 and 1 lower a score.
        sigma: Width of the Gaussian of method 2.
        min_score: A box whose lowered score is below this is dropped.
        method: How an overlap lowers a score. 0: to zero; 1: by the factor one minus the overlap;
            2: by the factor exp(-overlap² / sigma).
        offset: 0, or 1 for boxes whose widths are x2 - x1 + 1.

    Returns:
        Indices of the boxes kept, in the order of ``dets``, int64 in shape (K,).
    """
    _announce()
    corners = boxes.float()
    areas = (corners[:, 2:] - corners[:, :2] + offset).prod(dim=1)
    # Every row is a candidate: x1, y1, x2, y2, area, score. `order` holds the index of its box.
    # Among equal scores the first row is picked, so rows are moved as mmcv's kernel moves them.
    rows = torch.cat((corners, areas[:, None], scores.float()[:, None]), dim=1)
    order = torch.arange(len(rows), device=rows.device)
    done = 0
    while done < len(rows):
        best = done + int(rows[done:, 5].argmax())
        swap = [best, done]
        rows[[done, best]], order[[done, best]] = rows[swap], order[swap]

        rest = rows[done + 1 :]
        overlap = _overlap(rows[done], rest, offset)
        if method == 0:
            factor = (overlap < iou_threshold).float()
        elif method == 1:
            factor = torch.where(overlap < iou_threshold, 1.0, 1.0 - overlap)
        else:
            factor = torch.exp(-overlap.square() / sigma)
        rest[:, 5] *= factor

        done += 1
        left = done + _fill_gaps(rest[:, 5] >= min_score)
        rows = torch.cat((rows[:done], rows[left]))
        order = torch.cat((order[:done], order[left]))
    dets[: len(rows), :4] = rows[:, :4]
    dets[: len(rows), 4] = rows[:, 5]
    return order


def _overlap(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Return the intersection over union of a row of :func:`softnms` with N others, (N,)."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:4], boxes[:, 2:4])
    shared = (high - low + offset).clamp(min=0).prod(dim=1)
    # Two empty boxes do not overlap: 0 rather than 0 / 0.
    return (shared / (box[4] + boxes[:, 4] - shared)).nan_to_num(nan=0.0)


def _fill_gaps(kept: Tensor) -> Tensor:
    """Return the indices of the rows to keep, with gaps filled from the end.

    The last row takes the place of one that is dropped, as in mmcv's kernel.

    Args:
        kept: Whether each row is kept, bool in shape (N,).
    """
    count = int(kept.sum())
    places = torch.arange(count, device=kept.device)
    places[~kept[:count]] = (count + kept[count:].nonzero().squeeze(1)).flip(0)
    return places


# ------------------------------------------------------------------------------------------------
# RoIAlign
# ------------------------------------------------------------------------------------------------


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Sample each region on a regular grid of bins, bilinearly, at several points in each bin.

    Args:
        input: Features in shape (N, C, H, W).
        rois: Regions in shape (K, 5): index of the image, then x1, y1, x2, y2 in its pixels.
        output: Output in shape (K, C, aligned_height, aligned_width).
        argmax_y: Output in the shape of ``output``, written if ``pool_mode`` is 0: the row, in
            pixels of the features, of the sampling point with the maximum, or -1 without a point.
        argmax_x: Likewise, its column.
        aligned_height: Number of rows of bins.
        aligned_width: Number of columns of bins.
        spatial_scale: Size of the features divided by that of the image.
        sampling_ratio: Sampling points along each side of a bin; 0 for one per pixel.
        pool_mode: 0 for the maximum of a bin's points, 1 for their average.
        aligned: Whether pixel centres are at half-integers, as in mmdet, or at integers.
    """
    ops = _torchvision().ops
    _announce()
    features = _at_least_float32(input)
    rois = rois.to(features.dtype)
    if pool_mode == 1:
        size = (aligned_height, aligned_width)
        pooled = ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)
        output.copy_(pooled)
        return
    output.fill_(_MAX_OF_NOTHING)
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    corners, sizes = _regions(rois, spatial_scale, aligned)
    for index, image in enumerate(rois[:, 0].long().tolist()):
        (left, top), (width, height) = corners[index], sizes[index]
        rows = _sampling_points(top, height, aligned_height, sampling_ratio)
        columns = _sampling_points(left, width, aligned_width, sampling_ratio)
        if rows.numel() and columns.numel():
            output[index], argmax_y[index], argmax_x[index] = _max_pool(
                features[image], rows, columns
            )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` with respect to the features.

    Args:
        grad_output: Gradient with respect to the output, in its shape.
        grad_input: Output in the shape of the features, (N, C, H, W).

    The other arguments are those of the forward pass, as it received or wrote them.
    """
    import torchvision  # noqa: F401 - it registers torch.ops.torchvision

    _announce()
    grad = _at_least_float32(grad_output)
    rois = rois.to(grad.dtype)
    if pool_mode == 1:
        bins = (aligned_height, aligned_width)
        summed = torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, *bins, *grad_input.shape, sampling_ratio, aligned
        )
        grad_input.copy_(summed)
        return
    images, channels, height, width = grad_input.shape
    rows, columns = argmax_y.to(grad.dtype), argmax_x.to(grad.dtype)
    image = rois[:, 0].long()[:, None]
    planes = (image * channels + torch.arange(channels, device=image.device))[:, :, None, None]
    grad = grad.masked_fill(rows == -1, 0)
    total = grad.new_zeros(images * channels * height * width)
    for pixel, share in _neighbours(rows, columns, height, width):
        total.index_add_(0, (planes * height * width + pixel).flatten(), (share * grad).flatten())
    grad_input.copy_(total.view_as(grad_input))


def _regions(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Return the corners x, y and the sizes of regions on the features, in shape (K, 2) each."""
    shift = 0.5 if aligned else 0.0
    boxes = rois[:, 1:] * spatial_scale - shift
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    return corners, sizes if aligned else sizes.clamp(min=1)


def _sampling_points(start: Tensor, length: Tensor, bins: int, ratio: int) -> Tensor:
    """Return where a region is sampled along one side, in shape (bins, points per bin)."""
    size = length / bins
    points = ratio if ratio > 0 else max(int(size.ceil()), 0)
    within = (torch.arange(points).to(size) + 0.5) * size / points
    return start + torch.arange(bins).to(size)[:, None] * size + within


def _max_pool(features: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool one region of one image by maximum.

    Args:
        features: In shape (C, H, W).
        rows: Where each row of bins is sampled, (h, points per bin).
        columns: Where each column of bins is sampled, (w, points per bin).

    Returns:
        The maxima, and the rows and columns of their points, in shape (C, h, w) each.
    """
    pixels = features.flatten(1)
    y, x = rows.flatten()[:, None], columns.flatten()
    sampled = sum(
        share * pixels[:, pixel] for pixel, share in _neighbours(y, x, *features.shape[1:])
    )
    bins = sampled.unflatten(2, columns.shape).unflatten(1, rows.shape).transpose(2, 3).flatten(3)
    # Among equal values argmax takes the first, as mmcv does.
    best = bins.argmax(dim=3)
    at_row = best.div(columns.shape[1], rounding_mode='floor')
    at_column = best % columns.shape[1]
    down = torch.arange(len(rows), device=best.device)[:, None]
    across = torch.arange(len(columns), device=best.device)
    maxima = bins.gather(3, best[..., None]).squeeze(3)
    return maxima, rows[down, at_row], columns[across, at_column]


def _neighbours(y: Tensor, x: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return the four pixels around each point and their weights in bilinear interpolation.

    Args:
        y: Rows of the points.
        x: Columns of the points, of a shape that broadcasts with that of ``y``.
        height: Number of rows of pixels. A point up to one row outside counts as on the border;
            one farther out gets weight zero for every pixel.
        width: Number of columns of pixels, likewise.

    Returns:
        Four pairs of indices into the flattened pixels and weights in the points' dtype.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = y - top, x - left
    up, back = 1 - down, 1 - across
    return [
        (top * width + left, up * back * inside),
        (top * width + right, up * across * inside),
        (bottom * width + left, down * back * inside),
        (bottom * width + right, down * across * inside),
    ]


# ------------------------------------------------------------------------------------------------
# Focal losses
# ------------------------------------------------------------------------------------------------


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of every class against the rest.

    Args:
        input: Logits in shape (N, C).
        target: Labels in shape (N,), int64; any that is not a class, such as C, is background.
        weight: Weight of each class, in shape (C,), or empty, in shape (0,), for 1 everywhere.
            Background always has weight 1.
        output: Output in shape (N, C).
        gamma: Exponent by which well classified samples count less.
        alpha: Weight of a label's own class; the others have 1 - alpha.

    Raises:
        ValueError: If a label is greater than C.
    """
    _announce()
    _check_labels(target, input.shape[1])
    own = _is_own_class(input, target)
    prob = _sigmoid(input)
    loss_own = -alpha * (1 - prob) ** gamma * _log(prob)
    loss_other = -(1 - alpha) * prob**gamma * _log(1 - prob)
    loss = torch.where(own, loss_own, loss_other)
    output.copy_(loss * _weights(weight, target, loss)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of :func:`sigmoid_focal_loss_forward` with respect to the logits.

    Args:
        grad_input: Output in shape (N, C).

    The other arguments are those of the forward pass.
    """
    _announce()
    own = _is_own_class(input, target)
    prob = _sigmoid(input)
    rest = 1 - prob
    grad_own = -alpha * rest**gamma * (rest - gamma * prob * _log(prob))
    grad_other = -(1 - alpha) * prob**gamma * (gamma * rest * _log(rest) - prob)
    grad = torch.where(own, grad_own, grad_other)
    grad_input.copy_(grad * _weights(weight, target, grad)[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of each label's class, given the softmax over all classes.

    Args:
        input: Probabilities, after the softmax, in shape (N, C).
        target: Labels in shape (N,), int64; one that is not a class has loss zero.
        weight: Weight of each class, in shape (C,), or empty, in shape (0,), for 1 everywhere.
        output: Output in shape (N,).
        gamma: Exponent by which well classified samples count less.
        alpha: Factor on the loss.

    Raises:
        ValueError: If a label is greater than C.
    """
    _announce()
    _check_labels(target, input.shape[1])
    prob, known = _prob_of_label(input, target)
    loss = -alpha * (1 - prob) ** gamma * _log(prob)
    output.copy_(loss * known * _weights(weight, target, loss))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative of :func:`softmax_focal_loss_forward` with respect to the logits.

    Args:
        buff: Output in shape (N,): the derivative with respect to the label's logit, divided by
            one minus its probability.
        grad_input: Output in shape (N, C).

    The other arguments are those of the forward pass.
    """
    _announce()
    prob, known = _prob_of_label(input, target)
    # Clamped, since with gamma < 1 a certain sample would give infinity times zero.
    rest = (1 - prob).clamp(min=_SMALLEST)
    slope = alpha * (gamma * rest ** (gamma - 1) * prob * _log(prob) - rest**gamma)
    slope = slope * known * _weights(weight, target, slope)
    buff.copy_(slope)
    own = _is_own_class(input, target)
    grad_input.copy_(slope[:, None] * (own.to(slope) - _at_least_float32(input)))


def _check_labels(target: Tensor, classes: int) -> None:
    if target.numel() and (largest := int(target.max())) > classes:
        raise ValueError(
            f'a label is {largest}, but there are {classes} classes: set num_classes to the number '
            f'of classes in the data (labels run from 0, and {classes} is background)'
        )


def _is_own_class(input: Tensor, target: Tensor) -> Tensor:
    """Return which entries of ``input`` belong to the label of their row, in shape (N, C)."""
    return target[:, None] == torch.arange(input.shape[1], device=target.device)


def _prob_of_label(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of each label and whether it is a class, in shape (N,) each."""
    known = (target >= 0) & (target < input.shape[1])
    label = target.where(known, 0)
    return _at_least_float32(input).gather(1, label[:, None]).squeeze(1), known


def _weights(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """Return the weight of each label, in shape (N,), in the dtype of ``like``."""
    counts = torch.ones_like(target, dtype=like.dtype)
    if weight.numel():
        known = (target >= 0) & (target < len(weight))
        counts[known] = weight.to(like.dtype)[target[known]]
    return counts


def _sigmoid(logits: Tensor) -> Tensor:
    # Written out as in mmcv: in float32 a logit of 20 then has a probability of exactly 1.
    return 1 / (1 + torch.exp(-_at_least_float32(logits)))


def _log(prob: Tensor) -> Tensor:
    return prob.clamp(min=_SMALLEST).log()


# ------------------------------------------------------------------------------------------------
# Multi-scale deformable attention
# ------------------------------------------------------------------------------------------------


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Sum values at sampling points in several feature maps, weighted by attention.

    Args:
        value: Flattened feature maps, one after the other, in shape (B, pixels, heads, C).
        value_spatial_shapes: Height and width of each map, in shape (maps, 2).
        value_level_start_index: Index of the first pixel of each map, in shape (maps,).
        sampling_locations: x and y, from 0 to 1 across a map, in shape
            (B, queries, heads, maps, points, 2). Outside a map values are zero.
        attention_weights: In shape (B, queries, heads, maps, points).
        im2col_step: Number of images that mmcv's kernel takes at a time; here it takes all.

    Returns:
        Sums in shape (B, queries, heads * C).
    """
    _announce()
    exact = _at_least_float32(value)
    sums = _attend(
        exact,
        value_spatial_shapes.tolist(),
        value_level_start_index.tolist(),
        sampling_locations.to(exact.dtype),
        attention_weights.to(exact.dtype),
    )
    return sums.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward`.

    Args:
        grad_output: Gradient with respect to the sums, in shape (B, queries, heads * C).
        grad_value: Output in the shape of ``value``.
        grad_sampling_loc: Output in the shape of ``sampling_locations``.
        grad_attn_weight: Output in the shape of ``attention_weights``.

    The other arguments are those of the forward pass.
    """
    _announce()
    dtype = _at_least_float32(value).dtype
    inputs = [
        tensor.detach().to(dtype).requires_grad_()
        for tensor in (value, sampling_locations, attention_weights)
    ]
    shapes, starts = value_spatial_shapes.tolist(), value_level_start_index.tolist()
    with torch.enable_grad():
        sums = _attend(inputs[0], shapes, starts, *inputs[1:])
    grads = torch.autograd.grad(sums, inputs, grad_output.to(sums.dtype))
    for written, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        written.copy_(grad)


def _attend(
    value: Tensor,
    shapes: list[list[int]],
    starts: list[int],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Compute :func:`ms_deform_attn_forward` differentiably, on tensors of one dtype."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    sums = value.new_zeros(batch * heads, channels, queries)
    for level, ((height, width), start) in enumerate(zip(shapes, starts)):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        # For grid_sample a map extends from -1 to 1.
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(
            maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False
        )
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sums = sums + (sampled * weight[:, None]).sum(dim=-1)
    return sums.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------------
# Deformable convolution
# ------------------------------------------------------------------------------------------------


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve at sampling points that are moved away from the grid, without a bias.

    Args:
        input: In shape (B, C, H, W). Outside a map values are zero.
        weight: In shape (N, C / group, kH, kW).
        offset: How far each sampling point is moved, y and x, in shape
            (B, deformable_group * kH * kW * 2, h, w).
        output: Output in shape (B, N, h, w).
        columns, ones: Work memory of mmcv's kernels, not used here.
        kW, kH: Size of the kernel.
        dW, dH: Strides.
        padW, padH: Zeros on each side of the map.
        dilationW, dilationH: Spacing of the kernel's points.
        group: Number of groups of channels that are convolved separately.
        deformable_group: Number of groups of channels with their own offsets.
        im2col_step: Number of images that mmcv's kernel takes at a time, not used here.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_deform_conv(input, weight, offset, None, None, settings))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` with respect to input and offset.

    Args:
        gradOutput: Gradient with respect to the output, in its shape.
        gradInput: Output in the shape of ``input``.
        gradOffset: Output in the shape of ``offset``.

    The other arguments are those of the forward pass.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(gradOutput, input, weight, offset, None, settings)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of :func:`deform_conv_forward` with respect to the weight.

    Args:
        gradOutput: Gradient with respect to the output, in its shape.
        gradWeight: In the shape of the weight; the gradient is added to it.
        scale: Factor on the gradient.

    The other arguments are those of the forward pass.
    """
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(gradOutput, input, gradWeight, offset, None, settings)
    gradWeight.add_(grads[1].to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolve as :func:`deform_conv_forward`, with a factor on every sampling point.

    Args:
        bias: In shape (N,), added if ``with_bias``.
        mask: The factors, in shape (B, deformable_group * kernel_h * kernel_w, h, w).

    The other arguments are those of :func:`deform_conv_forward`.
    """
    settings = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    given = bias if with_bias else None
    size = output.shape[2:]
    offset, mask = _as_read(offset, size), _as_read(mask, size)
    output.copy_(_deform_conv(input, weight, offset, mask, given, settings))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the gradients of :func:`modulated_deform_conv_forward`.

    Args:
        grad_input, grad_weight, grad_bias, grad_offset, grad_mask: Outputs in the shapes of what
            they belong to. ``grad_bias`` is written if ``with_bias``.
        grad_output: Gradient with respect to the output, in its shape.

    The other arguments are those of the forward pass.
    """
    settings = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    size = grad_output.shape[2:]
    read_offset, read_mask = _as_read(offset, size), _as_read(mask, size)
    grads = _deform_conv_backward(grad_output, input, weight, read_offset, read_mask, settings)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    for place, grad in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        whole = grad.new_zeros(place.shape)
        whole.flatten(1)[:, : grad[0].numel()] = grad.flatten(1)
        place.copy_(whole)
    if with_bias:
        grad_bias.copy_(grads[4])


def _as_read(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return offsets or factors as mmcv's kernels read those of a larger map.

    DyHead passes a level the offsets of the larger level below. The kernels read them in memory
    order as if they had the level's own size, so published networks were trained with the first.
    """
    count = values.shape[1] * math.prod(size)
    return values.flatten(1)[:, :count].unflatten(1, (-1, *size))


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    settings: tuple[int, ...],
) -> Tensor:
    """Return a deformable convolution.

    Args:
        mask: None for a factor of 1 everywhere.
        bias: None for zero.
        settings: Strides, paddings, dilations, groups and groups of offsets.
    """
    _torchvision()
    _announce()
    tensors = _for_torchvision(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*tensors, *settings, mask is not None)


def _deform_conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    settings: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to input, weight, offset, mask and bias."""
    _torchvision()
    tensors = _for_torchvision(input, weight, offset, mask, None)
    return torch.ops.torchvision._deform_conv2d_backward(
        grad.to(tensors[0].dtype), *tensors, *settings, mask is not None
    )


def _for_torchvision(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    exact = _at_least_float32(input)
    if mask is None:
        mask = exact.new_zeros(len(input), 1)
    if bias is None:
        bias = exact.new_zeros(len(weight))
    return [exact, *(tensor.to(exact.dtype) for tensor in (weight, offset, mask, bias))]


# ------------------------------------------------------------------------------------------------
# Masked convolution
# ------------------------------------------------------------------------------------------------


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the inputs that a convolution of stride 1 uses for some pixels of its output.

    Args:
        im: One image in shape (1, C, H, W).
        mask_h_idx: Rows of the pixels, int64 in shape (K,).
        mask_w_idx: Columns of the pixels, likewise.
        col: Output in shape (C * kernel_h * kernel_w, K).
        kernel_h, kernel_w: Size of the kernel.
        pad_h, pad_w: Zeros on each side of the image.
    """
    _announce()
    width = im.shape[3] + 2 * pad_w - kernel_w + 1
    seen = F.unfold(im, (kernel_h, kernel_w), padding=(pad_h, pad_w))
    col.copy_(seen[0, :, mask_h_idx * width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write values to some pixels of an image.

    Args:
        col: The values, in shape (channels, K).
        mask_h_idx: Rows of the pixels, int64 in shape (K,).
        mask_w_idx: Columns of the pixels, likewise.
        im: Output in shape (1, channels, height, width); its other pixels are unchanged.
    """
    _announce()
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
