"""Whether a model applies the normalization that published weights expect.

The published ImageNet backbones and ADE20K segmentors were trained on RGB images with the mean and
the standard deviation of ImageNet. Images in BGR, which is how mmcv reads them, or in another range
give features that look plausible but are wrong. In mm's configs::

    data_preprocessor = dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    )

The files of the low-resolution network (CIFAR-10, SVHN, Tiny-ImageNet) expect CIFAR-10's values
instead; all are in :mod:`polynext_mm.normalization`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ...compat.mmengine import converts_channels, normalizes
from ...nn import ARCHS
from ...normalization import IMAGENET, LOW_RESOLUTION
from .. import models

_TOLERANCE = 1.0  # some configs round to integers
# by package and name: importing mmseg takes seconds, and it may not be installed
_KNOWN_KINDS = (('mmengine', 'ImgDataPreprocessor'), ('mmseg', 'SegDataPreProcessor'))


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A normalization that is not the one of the published weights.

    Attributes:
        text: What the data preprocessor does to images, and what it should do.
        is_certain: Whether the preprocessor is of a kind that is known here: mmengine's, mmseg's
            or one derived from them. Others may use the same names differently, so for those a
            mismatch is only a reason to warn.
    """

    text: str
    is_certain: bool

    def __str__(self) -> str:
        return self.text


def find_mismatch(model: nn.Module) -> Mismatch | None:
    """Find a normalization that is not the one of the published weights.

    For images that are stacked along their channels, such as the two of change detection, the three
    values of the mean and of the standard deviation are repeated.

    Args:
        model: A model of an mm package, without wrappers.

    Returns:
        The difference. None if there is none, if the data preprocessor has no mean and standard
        deviation to look at, or if the backbone takes channels other than RGB.
    """
    backbones = models.backbones(model).values()
    if any(backbone.stem.weight.shape[1] != 3 for backbone in backbones):
        return None
    preprocessor = getattr(model, 'data_preprocessor', None)
    while hasattr(preprocessor, 'data_preprocessor'):  # such as mmdet's MultiBranchDataPreprocessor
        preprocessor = preprocessor.data_preprocessor
    if not isinstance(preprocessor, nn.Module) or normalizes(preprocessor) is None:
        return None
    mean, std = ([0.0], [1.0])
    if normalizes(preprocessor):
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    # mmcv reads BGR; the other name is that of mmpretrain and mmaction2
    setting = 'to_rgb' if hasattr(preprocessor, 'to_rgb') else 'bgr_to_rgb'
    is_rgb = converts_channels(preprocessor) or getattr(preprocessor, 'to_rgb', False)
    is_low = any(getattr(backbone, 'arch', None) == ARCHS['cpolynext_lr'] for backbone in backbones)
    right = (LOW_RESOLUTION if is_low else IMAGENET).of_bytes()
    if is_rgb and _are_close(mean, right[0]) and _are_close(std, right[1]):
        return None
    text = (
        f'data_preprocessor gives {"RGB" if is_rgb else "BGR"} images with mean={_rounded(mean)}, '
        f'std={_rounded(std)}, and the published weights expect RGB images ({setting}=True) with '
        f'mean={list(right[0])}, std={list(right[1])}'
    )
    return Mismatch(text, _is_known(preprocessor))


def _is_known(preprocessor: nn.Module) -> bool:
    return any(
        (kind.__module__.partition('.')[0], kind.__name__) in _KNOWN_KINDS
        for kind in type(preprocessor).__mro__
    )


def _are_close(values: Sequence[float], expected: Sequence[float]) -> bool:
    """Return whether values are the expected ones, possibly repeated."""
    repetitions, rest = divmod(len(values), len(expected))
    return (
        repetitions > 0
        and rest == 0
        and all(
            abs(value - other) <= _TOLERANCE
            for value, other in zip(values, [*expected] * repetitions)
        )
    )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
