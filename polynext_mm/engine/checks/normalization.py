"""The normalization that published weights expect, and whether a model applies it.

The published ImageNet backbones and ADE20K segmentors were trained on RGB images from which
:data:`MEAN` was subtracted before the division by :data:`STD`. Images in BGR, which is how mmcv
reads them, or in another range give features that look fine and are not. In mm's configs::

    data_preprocessor = dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    )

The files of the low-resolution network, of CIFAR-10, SVHN and Tiny-ImageNet, expect
:data:`LOW_RESOLUTION_MEAN` and :data:`LOW_RESOLUTION_STD` instead.
"""

from __future__ import annotations

from torch import nn

from ...nn import ARCHS

MEAN = (123.675, 116.28, 103.53)  # of R, G, B from 0 to 255
STD = (58.395, 57.12, 57.375)
# CIFAR-10's, which the release uses for all three data sets: LOWRES_MEAN and LOWRES_STD in utils.py
# of github.com/jjwang8/PolyNeXt, times 255.
LOW_RESOLUTION_MEAN = (125.307, 122.95, 113.865)
LOW_RESOLUTION_STD = (62.993, 62.089, 66.705)
_TOLERANCE = 1.0  # some configs round to integers


def find_mismatch(model: nn.Module) -> str | None:
    """Describe a normalization that is not the one of the published weights.

    Args:
        model: A segmentor or detector of mm, without wrappers.

    Returns:
        What the model's ``data_preprocessor`` does to images and what it should do. None if they
        agree, or if the preprocessor is of an unknown kind.
    """
    preprocessor = getattr(model, 'data_preprocessor', None)
    while hasattr(preprocessor, 'data_preprocessor'):  # such as mmdet's MultiBranchDataPreprocessor
        preprocessor = preprocessor.data_preprocessor
    if not hasattr(preprocessor, '_enable_normalize'):
        return None
    normalizes = preprocessor._enable_normalize
    mean = preprocessor.mean.flatten().tolist() if normalizes else [0.0]
    std = preprocessor.std.flatten().tolist() if normalizes else [1.0]
    # mmcv reads BGR; the second name is that of upstream's mmseg
    names = ('_channel_conversion', 'channel_conversion')
    is_rgb = any(getattr(preprocessor, name, False) for name in names)
    is_low = getattr(getattr(model, 'backbone', None), 'arch', None) == ARCHS['cpolynext_lr']
    right = (LOW_RESOLUTION_MEAN, LOW_RESOLUTION_STD) if is_low else (MEAN, STD)
    if is_rgb and _are_close(mean, right[0]) and _are_close(std, right[1]):
        return None
    return (
        f'data_preprocessor gives {"RGB" if is_rgb else "BGR"} images with mean={_rounded(mean)}, '
        f'std={_rounded(std)}, and the published weights expect RGB images (bgr_to_rgb=True) with '
        f'mean={list(right[0])}, std={list(right[1])}'
    )


def _are_close(values: list[float], expected: tuple[float, ...]) -> bool:
    return len(values) == len(expected) and all(
        abs(value - other) <= _TOLERANCE for value, other in zip(values, expected)
    )


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
