"""The normalization of the images that published weights were trained on."""

from __future__ import annotations

import dataclasses

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What is subtracted from the channels of an image, and what the rest is divided by.

    Args:
        mean: Means of R, G and B, for values from 0 to 1.
        std: Their standard deviations.
    """

    mean: Triple
    std: Triple

    def of_bytes(self) -> tuple[Triple, Triple]:
        """Return mean and standard deviation for values from 0 to 255, as mm's configs have them.

        Rounded to three decimals, as they are usually written.
        """
        return _times_255(self.mean), _times_255(self.std)


def _times_255(values: Triple) -> Triple:
    red, green, blue = (round(255 * value, 3) for value in values)
    return red, green, blue


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

#: CIFAR-10's, which the release uses for SVHN and Tiny-ImageNet too: LOWRES_MEAN and LOWRES_STD in
#: utils.py of github.com/jjwang8/PolyNeXt.
LOW_RESOLUTION = Normalization(
    (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
)
