"""A stand-in for ``mmcv._ext``, the compiled extension behind ``mmcv.ops``.

:func:`polynext_mm.compat.install_mmcv_ops` loads this file under the name ``mmcv._ext``. Names of
operators and of their arguments are those of the compiled extension, and like there most results
are written into tensors that the caller hands over. The operators that detectors and segmentors
need to train and to predict are made of torchvision's kernels and of plain torch, and run on any
device that has those; any other operator exists, so that ``mmcv.ops`` can be imported, and raises
``NotImplementedError`` when it is called.

Everything is computed in float32, or in float64 where the input is: float16 and bfloat16 tensors
come in under mixed precision, which torchvision's kernels do not all take. The types are explicit
throughout, so that autocasting does not change a result.

One difference remains: under ``torch.use_deterministic_algorithms(True)`` the backward passes of
RoIAlign and deformable attention raise on a GPU, where mmcv's kernels carry on regardless.
"""

import functools
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from polynext_mm.compat.packages import how_to_compile_mmcv

#: Why the compiled extension could not be imported; set by ``install_mmcv_ops``.
why_missing = 'mmcv._ext was not tried'

# The smallest positive normal float32: what the focal losses take the logarithm of, at least.
_SMALLEST = torch.finfo(torch.float32).tiny

# What mmcv's CPU kernel pools from a region so small that it holds no sampling point.
_MAX_OF_NOTHING = -10000.0


def __getattr__(name: str) -> Callable:
    """Return an operator that has no stand-in: it raises when it is called."""
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
    """Say in the log, at the first operator called, which implementation it is."""
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
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(importlib.import_module, 'torchvision').result()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ------------------------------------------------------------------------------------------------
# Environment
# ------------------------------------------------------------------------------------------------


def get_compiler_version() -> str:
    """Return what stands for the compiler's version in a report of the environment."""
    return f'not compiled (polynext_mm on torchvision {metadata.version("torchvision")})'


def get_compiling_cuda_version() -> str:
    """Return what stands for CUDA's version in a report of the environment."""
    return get_compiler_version()


# ------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Keep the boxes that overlap no box of a higher score by more than a threshold.

    Args:
        boxes: Corners x1, y1, x2, y2, in shape (N, 4).
        scores: In shape (N,). Of equal scores the one that ``torch.sort`` puts first is higher.
        iou_threshold: Overlap, as intersection over union, that is still kept.
        offset: 0, or 1 for boxes whose corners are pixels that belong to them, so that a width
            is x2 - x1 + 1.

    Returns:
        Indices of the boxes kept, by descending score, int64 in shape (K,).
    """
    ops = _torchvision().ops
    _announce()
    boxes = boxes.float()
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # mmcv compares in float32 and torchvision with a float64 threshold, which makes a difference
    # to boxes that overlap by just the threshold: 0.6 is more in float32 than in float64.
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
        dets: Output in shape (N, 5): the boxes that are left and their new scores, from the
            highest down, in the first K rows.
        iou_threshold: Overlap from which methods 0 and 1 lower a score.
        sigma: Width of the Gaussian of method 2.
        min_score: A box whose lowered score is below this is dropped.
        method: What an overlap does to a score. 0: it becomes 0; 1: times one minus the overlap;
            2: times exp(-overlap² / sigma).
        offset: 0, or 1 for boxes whose widths are x2 - x1 + 1.

    Returns:
        Indices of the boxes left, in the order of ``dets``, int64 in shape (K,).
    """
    _announce()
    corners = boxes.float()
    areas = (corners[:, 2:] - corners[:, :2] + offset).prod(dim=1)
    # Candidates are columns x1, y1, x2, y2, area, score; `order` says which box each one is.
    # Equal scores are picked in the order of the rows, which therefore move as in mmcv's kernel.
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
    """Return the intersection over union of a row of :func:`softnms` with others, (N,)."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:4], boxes[:, 2:4])
    shared = (high - low + offset).clamp(min=0).prod(dim=1)
    # Two boxes without area share nothing: 0 rather than 0 / 0.
    return (shared / (box[4] + boxes[:, 4] - shared)).nan_to_num(nan=0.0)


def _fill_gaps(kept: Tensor) -> Tensor:
    """Return the indices of the rows kept, (N,) of bool, with gaps filled from the end.

    A row that is dropped gives its place to the last row there is, as in mmcv's kernel.
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
        rois: Regions in shape (K, 5): index of the image, and x1, y1, x2, y2 in pixels of it.
        output: Output in shape (K, C, aligned_height, aligned_width).
        argmax_y: Output of the shape of ``output``, for ``pool_mode`` 0 only: rows of the
            sampling points that the maxima are from, in pixels of the features, or -1 for none.
        argmax_x: Likewise their columns.
        aligned_height: Rows of bins.
        aligned_width: Columns of bins.
        spatial_scale: Size of the features over that of the image.
        sampling_ratio: Sampling points along each side of a bin; 0 for one per pixel.
        pool_mode: 0 for the maximum of a bin's points, 1 for their average.
        aligned: Whether pixels have their centres at halves, as mmdet's have, or at integers.
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
    """Write the gradient by the features of :func:`roi_align_forward`.

    Args:
        grad_output: Gradient by the output, in shape (K, C, aligned_height, aligned_width).
        grad_input: Output in the shape of the features, (N, C, H, W).

    The other arguments are those of the forward pass, as it got or wrote them.
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
    """Return the corners x, y and the sizes of regions on the features, (K, 2) each."""
    shift = 0.5 if aligned else 0.0
    boxes = rois[:, 1:] * spatial_scale - shift
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    return corners, sizes if aligned else sizes.clamp(min=1)


def _sampling_points(start: Tensor, length: Tensor, bins: int, ratio: int) -> Tensor:
    """Return where each bin along one side of a region is sampled, (bins, points per bin)."""
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
        The maxima and the rows and columns of the points they are from, (C, h, w) each.
    """
    pixels = features.flatten(1)
    y, x = rows.flatten()[:, None], columns.flatten()
    sampled = sum(
        share * pixels[:, pixel] for pixel, share in _neighbours(y, x, *features.shape[1:])
    )
    bins = sampled.unflatten(2, columns.shape).unflatten(1, rows.shape).transpose(2, 3).flatten(3)
    # Of equal values argmax takes the first, and so does mmcv.
    best = bins.argmax(dim=3)
    at_row = best.div(columns.shape[1], rounding_mode='floor')
    at_column = best % columns.shape[1]
    down = torch.arange(len(rows), device=best.device)[:, None]
    across = torch.arange(len(columns), device=best.device)
    maxima = bins.gather(3, best[..., None]).squeeze(3)
    return maxima, rows[down, at_row], columns[across, at_column]


def _neighbours(y: Tensor, x: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return the four pixels around points and what share each has in them.

    Args:
        y: Rows of the points.
        x: Columns of the points, of a shape that broadcasts with that of ``y``.
        height: Rows of pixels. A point up to one row outside counts as on the border, one that
            is further out has no share in any pixel.
        width: Columns of pixels, likewise.

    Returns:
        Four pairs: indices into the flattened pixels, and shares of the points' type.
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
        weight: Weights in shape (C,) by which the labels count, or none at all, in shape (0,).
            Background counts as 1.
        output: Output in shape (N, C).
        gamma: Power by which well classified samples are played down.
        alpha: Weight of a label's own class; the others have 1 - alpha.

    Raises:
        ValueError: If a label is more than C.
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
    """Write the derivative of :func:`sigmoid_focal_loss_forward` by the logits.

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
    """Write the focal loss of the label's class among all.

    Args:
        input: Probabilities, after the softmax, in shape (N, C).
        target: Labels in shape (N,), int64; one that is not a class has no loss.
        weight: Weights in shape (C,) by which the labels count, or none at all, in shape (0,).
        output: Output in shape (N,).
        gamma: Power by which well classified samples are played down.
        alpha: Factor of the loss.

    Raises:
        ValueError: If a label is more than C.
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
    """Write the derivative of :func:`softmax_focal_loss_forward` by the logits.

    Args:
        buff: Output in shape (N,): the derivative by the label's logit, over one minus its
            probability.
        grad_input: Output in shape (N, C).

    The other arguments are those of the forward pass.
    """
    _announce()
    prob, known = _prob_of_label(input, target)
    # Not 0 for a sample that is certain, lest gamma < 1 make infinity times zero of it.
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
    """Return which entries of ``input``, (N, C), are of their labels' classes."""
    return target[:, None] == torch.arange(input.shape[1], device=target.device)


def _prob_of_label(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of each label, and whether the label is a class, (N,) each."""
    known = (target >= 0) & (target < input.shape[1])
    label = target.where(known, 0)
    return _at_least_float32(input).gather(1, label[:, None]).squeeze(1), known


def _weights(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """Return by how much each label counts, (N,), in the type of ``like``."""
    counts = torch.ones_like(target, dtype=like.dtype)
    if weight.numel():
        known = (target >= 0) & (target < len(weight))
        counts[known] = weight.to(like.dtype)[target[known]]
    return counts


def _sigmoid(logits: Tensor) -> Tensor:
    # Spelled out as in mmcv, where a logit of 20 has just the probability 1 in float32.
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
    """Sum values at sampling points of several feature maps, by weight.

    Args:
        value: Flattened feature maps, one after the other, in shape (B, pixels, heads, C).
        value_spatial_shapes: Height and width of each map, in shape (maps, 2).
        value_level_start_index: Index of the first pixel of each map, in shape (maps,).
        sampling_locations: x and y from 0 to 1 across a map, in shape
            (B, queries, heads, maps, points, 2). There are zeros around a map.
        attention_weights: In shape (B, queries, heads, maps, points).
        im2col_step: How many images mmcv's kernel takes at a time; all are taken here.

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
        grad_output: Gradient by the sums, in shape (B, queries, heads * C).
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
    """Do :func:`ms_deform_attn_forward`, differentiably, on tensors of one type."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    sums = value.new_zeros(batch * heads, channels, queries)
    for level, ((height, width), start) in enumerate(zip(shapes, starts)):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        # grid_sample counts from -1 to 1 across a map.
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(
            maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False
        )
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sums = sums + (sampled * weight[:, None]).sum(dim=-1)
    return sums.view(batch, heads * channels, queries).transpose(1, 2).contiguous()
