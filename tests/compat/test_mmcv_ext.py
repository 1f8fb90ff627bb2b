"""mmcv's operators on the stand-in, against slow and plain versions of them."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from polynext_mm.compat import install_mmcv_ops, mmcv_ext

pytest.importorskip('mmcv')
install_mmcv_ops()
ops = importlib.import_module('mmcv.ops')
ext = sys.modules['mmcv._ext']

pytestmark = pytest.mark.skipif(
    ext.__file__ != mmcv_ext.__file__, reason='mmcv has its compiled extension'
)

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_boxes(count, step):
    """Boxes of up to 50 pixels, on a grid of ``step`` pixels, or anywhere if it is 0."""
    low = torch.rand(count, 2) * 60
    boxes = torch.cat((low, low + torch.rand(count, 2) * 50), dim=1)
    return (boxes / step).round() * step if step else boxes


def overlap(a, b, offset):
    """Intersection over union of two boxes, in float32; NaN if neither has an area."""
    a, b, offset = np.asarray(a, 'float32'), np.asarray(b, 'float32'), np.float32(offset)
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    with np.errstate(invalid='ignore'):
        return width * height / (area_a + area_b - width * height)


# ------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ------------------------------------------------------------------------------------------------


def plain_nms(boxes, scores, threshold, offset=0):
    kept = []
    for index in scores.sort(descending=True).indices.tolist():
        overlaps = [overlap(boxes[index], boxes[other], offset) for other in kept]
        if not any(value > np.float32(threshold) for value in overlaps):
            kept.append(index)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('step', [0, 1, 10])
@pytest.mark.parametrize('count', [0, 1, 2, 40])
def test_nms(count, step, offset):
    boxes, scores = random_boxes(count, step), torch.rand(count)
    for threshold in (0.1, 0.5, 0.6, 0.7):
        dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
        assert kept.tolist() == plain_nms(boxes, scores, threshold, offset)
        assert kept.dtype == torch.int64
        assert torch.equal(dets, torch.cat((boxes, scores[:, None]), dim=1)[kept])


def test_nms_keeps_an_overlap_of_just_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    assert overlap(*boxes, 0) == np.float32(0.6)
    for dtype in (torch.float32, torch.float64):
        assert ops.nms(boxes.to(dtype), torch.tensor([0.9, 0.8]), 0.6)[1].tolist() == [0, 1]


@pytest.mark.parametrize('count', [8, 60])
def test_nms_of_equal_scores_goes_by_the_order_of_torch_sort(count):
    boxes, scores = random_boxes(count, 10), (torch.rand(count) * 3).round()
    assert ops.nms(boxes, scores, 0.3)[1].tolist() == plain_nms(boxes, scores, 0.3)
    same = boxes[:1].expand(5, 4)
    assert ops.nms(same, torch.full((5,), 0.5), 0.3)[1].tolist() == [0]


def test_nms_keeps_boxes_without_area_and_boxes_far_outside():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [-900, -900, -800, -800], [0, 0, 9, 9]])
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == [0, 1, 2, 3]
    assert ops.nms(boxes, scores, 0.5, offset=1)[1].tolist() == [0, 2, 3]


@pytest.mark.parametrize('dtype', HALVES)
def test_nms_of_half_precision_counts_in_float32(dtype):
    boxes, scores = random_boxes(40, 1).to(dtype), torch.rand(40).to(dtype)
    kept = ext.nms(boxes, scores, iou_threshold=0.5, offset=0)
    assert kept.tolist() == plain_nms(boxes.float(), scores, 0.5)
    assert ops.nms(boxes, scores, 0.5)[0].dtype == dtype


def test_nms_is_the_same_under_autocast():
    boxes, scores = random_boxes(60, 0), torch.rand(60)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        kept = ops.nms(boxes, scores, 0.5)[1]
    assert kept.tolist() == plain_nms(boxes, scores, 0.5)


def plain_batched_nms(boxes, scores, labels, threshold, least):
    kept = []
    for label in labels.unique():
        own = ((labels == label) & (scores > least)).nonzero().squeeze(1)
        kept += own[plain_nms(boxes[own], scores[own], threshold)].tolist()
    return sorted(kept, key=lambda index: -scores[index])


@pytest.mark.parametrize('options', [{}, {'split_thr': 10}, {'max_num': 7}])
@pytest.mark.parametrize('least', [0, 0.2])
def test_batched_nms(least, options):
    boxes, scores, labels = random_boxes(60, 1), torch.rand(60), torch.randint(0, 4, (60,))
    config = {'type': 'nms', 'iou_threshold': 0.4, 'score_threshold': least, **options}
    dets, kept = ops.batched_nms(boxes, scores, labels, config)
    expected = plain_batched_nms(boxes, scores, labels, 0.4, least)
    assert kept.tolist() == expected[: options.get('max_num')]
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), dim=1)[kept])
    # Boxes may well overlap those of another class, unless classes are not told apart.
    kept = ops.batched_nms(boxes, scores, labels, config | {'split_thr': 100}, True)[1]
    expected = plain_batched_nms(boxes, scores, torch.zeros(60), 0.4, least)
    assert kept.tolist() == expected[: options.get('max_num')]


def plain_soft_nms(boxes, scores, threshold, sigma, least, method, offset):
    left = [[score, index] for index, score in enumerate(scores.tolist())]
    kept = []
    while left:
        left.sort(reverse=True)
        score, index = left.pop(0)
        kept.append((index, score))
        for entry in left:
            shared = np.nan_to_num(overlap(boxes[index], boxes[entry[1]], offset))
            if method == 'gaussian':
                entry[0] *= math.exp(-(float(shared) ** 2) / sigma)
            elif shared >= np.float32(threshold):
                entry[0] *= 1 - shared if method == 'linear' else 0
        left = [entry for entry in left if entry[0] >= least]
    return kept


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms(offset, method):
    for count, least in ((1, 0.9), (30, 1e-3), (30, 0.3)):
        boxes, scores = random_boxes(count, 10), torch.rand(count)
        expected = plain_soft_nms(boxes, scores, 0.3, 0.5, least, method, offset)
        dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, least, method, offset)
        assert kept.tolist() == [index for index, _ in expected]
        assert torch.equal(dets[:, :4], boxes[kept])
        torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))


def test_soft_nms_leaves_its_input_alone_and_has_no_nan():
    boxes = torch.tensor([[5.0, 5, 5, 5]]).expand(4, 4).contiguous()
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3])
    dets, kept = ops.soft_nms(boxes, scores, method='gaussian')
    assert kept.tolist() == [1, 3, 2, 0]
    assert dets[:, 4].tolist() == scores[kept].tolist()
    assert scores.tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))[0].shape == (0, 5)


def test_soft_nms_of_equal_scores_picks_as_the_compiled_kernel_does():
    # Boxes 1 and 2 are dropped, and each time the last one takes the free place and its turn.
    left = torch.tensor([0.0, 0, 0, 20, 40, 60])
    boxes = torch.stack((left, left * 0, left + 9, left * 0 + 9), dim=1)
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert ops.soft_nms(boxes, scores, min_score=0.1)[1].tolist() == [0, 5, 4, 3]


def test_batched_nms_takes_soft_nms():
    boxes, scores = random_boxes(20, 10), torch.rand(20)
    labels = torch.zeros(20, dtype=torch.int64)
    config = {'type': 'soft_nms', 'iou_threshold': 0.3, 'min_score': 0.2}
    kept = ops.batched_nms(boxes, scores, labels, config)[1]
    expected = plain_soft_nms(boxes, scores, 0.3, 0.5, 0.2, 'linear', 0)
    assert kept.tolist() == [index for index, _ in expected]


# ------------------------------------------------------------------------------------------------
# RoIAlign
# ------------------------------------------------------------------------------------------------

ROIS = [
    [0, 4, 4, 30, 27],
    [1, 0, 0, 40, 36],
    [1, -9, -7, 12, 60],  # partly outside
    [0, 200, 200, 240, 240],  # wholly outside
    [0, -60, 4, -40, 20],
    [0, 4, -60, 20, -40],
    [1, 80, 4, 99, 20],
    [1, 4, 80, 20, 99],
    [0, 12, 12, 12, 12],  # of size zero
    [1, 5.3, 7.7, 6.1, 8.2],  # smaller than a pixel of the features
]


def at(plane, y, x):
    """A plane's value at a point, bilinearly; zero more than a pixel outside."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.sum() * 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    y, x = y - top, x - left
    return (1 - y) * ((1 - x) * plane[top, left] + x * plane[top, right]) + y * (
        (1 - x) * plane[bottom, left] + x * plane[bottom, right]
    )


def plain_roi_align(features, rois, size, scale, ratio, mode, aligned):
    shift = 0.5 if aligned else 0
    pooled = []
    for image, *box in rois.tolist():
        left, top, right, bottom = (side * scale - shift for side in box)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        width, height = width / size[1], height / size[0]
        across, down = ratio or math.ceil(width), ratio or math.ceil(height)
        for plane in features[int(image)]:
            for row in range(size[0]):
                for column in range(size[1]):
                    points = [
                        at(
                            plane,
                            top + (row + (i + 0.5) / down) * height,
                            left + (column + (j + 0.5) / across) * width,
                        )
                        for i in range(down)
                        for j in range(across)
                    ]
                    if not points:
                        pooled.append(plane.sum() * 0 - (10000 if mode == 'max' else 0))
                    elif mode == 'max':
                        pooled.append(torch.stack(points).max())
                    else:
                        pooled.append(torch.stack(points).mean())
    return torch.stack(pooled).view(len(rois), features.shape[1], *size)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align(mode, ratio, aligned):
    features = torch.randn(2, 2, 9, 11, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    arguments = (rois, (2, 3), 0.25, ratio, mode, aligned)
    expected = plain_roi_align(features, *arguments)
    pooled = ops.roi_align(features, *arguments)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(pooled)
    for_pooled = torch.autograd.grad((pooled * weights).sum(), features)
    for_expected = torch.autograd.grad((expected * weights).sum(), features)
    torch.testing.assert_close(for_pooled, for_expected)


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_passes_gradcheck(mode):
    features = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([ROIS[0], ROIS[2], ROIS[3]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ops.roi_align(x, rois, (2, 2), 0.125, 0, mode, True), features
    )


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_no_region(mode):
    features = torch.randn(2, 3, 9, 11, requires_grad=True)
    pooled = ops.roi_align(features, torch.zeros(0, 5), (7, 7), 0.25, 0, mode, True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_half_precision_counts_in_float32(mode, dtype):
    features = torch.randn(2, 3, 9, 11).to(dtype).requires_grad_()
    exact = features.detach().float().requires_grad_()
    arguments = ((3, 3), 0.25, 0, mode, True)
    pooled = ops.roi_align(features, torch.tensor(ROIS, dtype=dtype), *arguments)
    expected = ops.roi_align(exact, torch.tensor(ROIS, dtype=dtype).float(), *arguments)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, expected.to(dtype))
    pooled.sum().backward()
    expected.sum().backward()
    # The places of maxima are kept in half precision, as mmcv keeps them.
    if mode == 'avg':
        assert torch.equal(features.grad, exact.grad.to(dtype))
    torch.testing.assert_close(features.grad.sum(), exact.grad.sum().to(dtype), rtol=0.02, atol=1)


def test_roi_align_is_the_same_under_autocast_and_in_channels_last():
    features, rois = torch.randn(2, 3, 9, 11), torch.tensor(ROIS)
    expected = plain_roi_align(features, rois, (2, 2), 0.25, 2, 'avg', True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pooled = ops.roi_align(features, rois, (2, 2), 0.25, 2, 'avg', True)
    torch.testing.assert_close(pooled, expected)
    features = features.contiguous(memory_format=torch.channels_last)
    pooled = ops.roi_align(features, rois, (2, 2), 0.25, 2, 'avg', True)
    torch.testing.assert_close(pooled, expected)


# ------------------------------------------------------------------------------------------------
# Focal losses
# ------------------------------------------------------------------------------------------------

TINY = float(np.finfo(np.float32).tiny)


def plain_sigmoid_focal_loss(logits, labels, gamma, alpha, weight):
    loss = torch.zeros(logits.shape, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        factor = weight[label].item() if weight is not None and label < len(weight) else 1
        for column, logit in enumerate(logits[row].tolist()):
            prob = 1 / (1 + math.exp(-logit))
            if column == label:
                value = -alpha * (1 - prob) ** gamma * math.log(max(prob, TINY))
            else:
                value = -(1 - alpha) * prob**gamma * math.log(max(1 - prob, TINY))
            loss[row, column] = factor * value
    return loss


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
def test_sigmoid_focal_loss(gamma, weighted):
    logits, labels = torch.randn(7, 4) * 3, torch.tensor([0, 1, 2, 3, 4, 4, 1])
    weight = torch.rand(4) if weighted else None
    expected = plain_sigmoid_focal_loss(logits, labels, gamma, 0.25, weight).float()
    loss = ops.sigmoid_focal_loss(logits, labels, gamma, 0.25, weight, 'none')
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for reduction, divisor in (('sum', 1), ('mean', 7)):
        loss = ops.sigmoid_focal_loss(logits, labels, gamma, 0.25, weight, reduction)
        torch.testing.assert_close(loss, expected.sum() / divisor, rtol=1e-4, atol=1e-6)


def plain_softmax_focal_loss(logits, labels, gamma, alpha, weight):
    loss = torch.zeros(len(labels), dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        if 0 <= label < logits.shape[1]:
            powers = [math.exp(logit) for logit in logits[row].tolist()]
            prob = powers[label] / sum(powers)
            factor = 1 if weight is None else weight[label].item()
            loss[row] = -alpha * factor * (1 - prob) ** gamma * math.log(max(prob, TINY))
    return loss


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
def test_softmax_focal_loss(gamma, weighted):
    logits, labels = torch.randn(7, 4) * 3, torch.tensor([0, 1, 2, 3, -1, 4, 1])
    weight = torch.rand(4) if weighted else None
    expected = plain_softmax_focal_loss(logits, labels, gamma, 0.25, weight).float()
    loss = ops.softmax_focal_loss(logits, labels, gamma, 0.25, weight, 'none')
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'softmax_focal_loss'])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [2.0, 1.5])
def test_focal_losses_pass_gradcheck(gamma, weighted, name):
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 1])
    weight = torch.rand(3, dtype=torch.float64) if weighted else None
    loss = getattr(ops, name)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, gamma, 0.25, weight, 'mean'), logits)


@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'softmax_focal_loss'])
@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
def test_focal_losses_of_certain_predictions_are_finite(gamma, name):
    logits = torch.tensor([[200.0, -200], [-200, 200]], requires_grad=True)
    loss = getattr(ops, name)(logits, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # The second sample is wrong: what it loses is cut off where float32 ends.
    assert loss.item() >= -0.25 * math.log(TINY)


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'softmax_focal_loss'])
def test_focal_losses_of_half_precision_are_close_under_autocast(name, dtype):
    logits, labels = torch.randn(50, 4).to(dtype).requires_grad_(), torch.randint(0, 4, (50,))
    exact = logits.detach().float().requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = getattr(ops, name)(logits, labels, 2.0, 0.25, None, 'sum')
    expected = getattr(ops, name)(exact, labels, 2.0, 0.25, None, 'sum')
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.01)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=0.05, atol=0.01)


@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'softmax_focal_loss'])
def test_focal_losses_refuse_labels_beyond_background(name):
    with pytest.raises(ValueError, match='a label is 4, but there are 3 classes: set num_classes'):
        getattr(ops, name)(torch.zeros(2, 3), torch.tensor([0, 4]))


def test_sigmoid_focal_loss_of_no_sample():
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert ops.sigmoid_focal_loss(*empty, 2.0, 0.25, None, 'sum') == 0


# ------------------------------------------------------------------------------------------------
# Multi-scale deformable attention
# ------------------------------------------------------------------------------------------------

SHAPES = torch.tensor([[4, 5], [2, 3]])
STARTS = torch.tensor([0, 20])


def attention_inputs(dtype=torch.float64):
    value = torch.randn(2, 26, 2, 3, dtype=dtype)
    locations = torch.rand(2, 3, 2, 2, 2, 2, dtype=dtype) * 1.6 - 0.3  # some are outside
    weights = torch.rand(2, 3, 2, 2, 2, dtype=dtype)
    return value, locations, weights


def plain_attention(value, locations, weights):
    batch, _, heads, channels = value.shape
    sums = value.new_zeros(batch, locations.shape[1], heads, channels)
    for image, query, head, level, point in np.ndindex(weights.shape):
        height, width = SHAPES[level].tolist()
        x, y = locations[image, query, head, level, point].tolist()
        x, y = x * width - 0.5, y * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    pixel = STARTS[level] + row * width + column
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    weight = weights[image, query, head, level, point]
                    sums[image, query, head] += weight * share * value[image, pixel, head]
    return sums.flatten(2)


def attend(value, locations, weights):
    attention = importlib.import_module('mmcv.ops.multi_scale_deform_attn')
    function = attention.MultiScaleDeformableAttnFunction
    return function.apply(value, SHAPES, STARTS, locations, weights, 64)


def test_deformable_attention():
    inputs = attention_inputs()
    torch.testing.assert_close(attend(*inputs), plain_attention(*inputs))


def test_deformable_attention_passes_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in attention_inputs()]
    assert torch.autograd.gradcheck(lambda *x: attend(*x), inputs)


@pytest.mark.parametrize('dtype', HALVES)
def test_deformable_attention_of_half_precision_counts_in_float32(dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in attention_inputs()]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        sums = attend(*inputs)
    expected = attend(*exact)
    assert torch.equal(sums, expected.to(dtype))
    sums.sum().backward()
    expected.sum().backward()
    for tensor, twin in zip(inputs, exact):
        assert torch.equal(tensor.grad, twin.grad.to(dtype))


def test_deformable_attention_of_no_query():
    value, locations, weights = attention_inputs()
    assert attend(value, locations[:, :0], weights[:, :0]).shape == (2, 0, 6)


# ------------------------------------------------------------------------------------------------
# Deformable convolution
# ------------------------------------------------------------------------------------------------

# size of the kernel, stride, padding, dilation, groups, groups of offsets
CONVOLUTIONS = [(3, 1, 1, 1, 1, 1), (2, 2, 1, 1, 2, 4), ((1, 3), 1, (0, 2), 2, 1, 2)]


def convolution_inputs(settings):
    size, stride, padding, dilation, groups, offset_groups = settings
    images = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    weight = torch.randn(4, 4 // groups, *(size if isinstance(size, tuple) else (size, size)))
    weight = weight.double()
    out = torch.nn.functional.conv2d(images, weight, None, stride, padding, dilation, groups)
    points = offset_groups * weight[0, 0].numel()
    offset = torch.randn(2, 2 * points, *out.shape[2:], dtype=torch.float64) * 2
    mask = torch.rand(2, points, *out.shape[2:], dtype=torch.float64)
    return images, offset, mask, weight, torch.randn(4, dtype=torch.float64)


def value_at(plane, y, x):
    """Interpolate between the pixels of a plane, which is zero outside."""
    total, (height, width) = 0.0, plane.shape
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def plain_convolution(images, offset, mask, weight, bias, settings):
    _, stride, padding, dilation, groups, offset_groups = settings
    pad = padding if isinstance(padding, tuple) else (padding, padding)
    images, mask, kernels = images.numpy(), mask.numpy(), weight.numpy()
    out = torch.zeros(2, 4, *offset.shape[2:], dtype=torch.float64) + bias[:, None, None]
    for image, channel, row, column in np.ndindex(out.shape):
        inputs = weight.shape[1]
        for own, down, across in np.ndindex(weight.shape[1:]):
            source = channel // (4 // groups) * inputs + own
            group = source // (4 // offset_groups)
            point = group * weight[0, 0].numel() + down * weight.shape[3] + across
            dy, dx = offset[image, 2 * point : 2 * point + 2, row, column].tolist()
            y = row * stride - pad[0] + down * dilation + dy
            x = column * stride - pad[1] + across * dilation + dx
            value = value_at(images[image, source], y, x) * mask[image, point, row, column]
            out[image, channel, row, column] += value * kernels[channel, own, down, across]
    return out


@pytest.mark.parametrize('settings', CONVOLUTIONS, ids=str)
def test_deformable_convolution(settings):
    images, offset, mask, weight, bias = convolution_inputs(settings)
    found = ops.modulated_deform_conv2d(images, offset, mask, weight, bias, *settings[1:])
    expected = plain_convolution(images, offset, mask, weight, bias, settings)
    torch.testing.assert_close(found, expected)
    found = ops.deform_conv2d(images, offset, weight, *settings[1:])
    expected = plain_convolution(images, offset, torch.ones_like(mask), weight, 0 * bias, settings)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('settings', CONVOLUTIONS, ids=str)
def test_deformable_convolution_passes_gradcheck(settings):
    images, offset, mask, weight, bias = (
        tensor.requires_grad_() for tensor in convolution_inputs(settings)
    )
    assert torch.autograd.gradcheck(
        lambda *given: ops.modulated_deform_conv2d(*given, *settings[1:]),
        (images, offset, mask, weight, bias),
        fast_mode=True,
    )
    assert torch.autograd.gradcheck(
        lambda *given: ops.deform_conv2d(*given, *settings[1:]),
        (images, offset, weight),
        fast_mode=True,
    )


# by mmcv 2.1.0's compiled operators: sums of result and gradients, each value times its place
LARGER_MAP = [684.6461181640625, -2868.474609375, 24973.78125, 395.69378662109375, 325.25390625]


def test_offsets_of_a_larger_map_are_read_as_by_mmcv():
    images = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    offset = ((torch.arange(288.0).view(1, 18, 4, 4) % 7 + 0.5) / 8).requires_grad_()
    mask = (torch.arange(144.0).view(1, 9, 4, 4) % 5 / 5).requires_grad_()
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3).requires_grad_()
    found = ops.modulated_deform_conv2d(images, offset, mask, weight, None, 2, 1)
    found.sum().backward()
    assert not offset.grad.flatten()[72:].any() and not mask.grad.flatten()[36:].any()
    numbers = [found, offset.grad, mask.grad, images.grad, weight.grad]
    sums = [
        (value * torch.arange(value.numel()).view(value.shape)).sum().item() for value in numbers
    ]
    assert sums == pytest.approx(LARGER_MAP, rel=1e-5)


@pytest.mark.parametrize('dtype', HALVES)
def test_deformable_convolution_of_half_precision_counts_in_float32(dtype):
    images, offset, mask, weight, bias = (
        tensor.to(dtype).requires_grad_() for tensor in convolution_inputs(CONVOLUTIONS[0])
    )
    given = (images, offset, mask, weight, bias)
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = ops.modulated_deform_conv2d(*given, 1, 1)
    expected = ops.modulated_deform_conv2d(*exact, 1, 1)
    assert torch.equal(found, expected.to(dtype))
    found.sum().backward()
    expected.sum().backward()
    for tensor, twin in zip(given, exact):
        assert torch.equal(tensor.grad, twin.grad.to(dtype))


@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_masked_convolution_is_a_convolution_where_the_mask_is(share):
    convolution = ops.MaskedConv2d(3, 4, (3, 1), padding=(1, 0))
    images, mask = torch.randn(1, 3, 6, 5), (torch.rand(1, 6, 5) < share).float()
    with torch.no_grad():
        found, whole = convolution(images, mask), convolution(images)
    torch.testing.assert_close(found, whole * mask)


# ------------------------------------------------------------------------------------------------
# The module itself
# ------------------------------------------------------------------------------------------------


def test_an_operator_without_stand_in_says_so_when_called():
    pooling = ops.RoIPool(2)
    with pytest.raises(NotImplementedError, match="'roi_pool_forward' needs .*: compile mmcv with"):
        pooling(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))
    with pytest.raises(NotImplementedError, match="No module named 'mmcv._ext'"):
        ext.carafe_forward(1, two=2)


def test_private_names_are_missing_as_usual():
    assert not hasattr(ext, '__path__')
    assert not hasattr(ext, '_hidden')
