"""The released ImageNet classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .arch import Arch
from .layers import LayerNorm, MakeNorm
from .polynext import PolyNeXt


class Classifier(nn.Module):
    """The released ImageNet head: ``Linear(mean of (l + l * r))``.

    l and r are the halves of ``pw(LN(feature))``, of width 4C.

    Args:
        channels: C, of the last stage.
        num_classes: Of the logits.
        dropout: Before the last layer.
        norm: Makes the norm.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        dropout: float = 0.0,
        norm: MakeNorm = LayerNorm,
    ):
        super().__init__()
        self.norm = norm(channels)
        self.proj = nn.Linear(channels, 4 * channels, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.fc: nn.Module = nn.Linear(2 * channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of a feature (B, C, H, W)."""
        return self.fc(self.dropout(self.products(feature).mean((1, 2))))

    def products(self, feature: Tensor) -> Tensor:
        """Return ``l + l * r``, (B, H, W, 2C), for a feature (B, C, H, W)."""
        left, right = self.proj(self.norm(feature.permute(0, 2, 3, 1))).chunk(2, -1)
        return left + left * right


class PolyNeXtClassifier(PolyNeXt):
    """PolyNeXt with the released ImageNet classifier, to check the published accuracy.

    Args:
        arch: As for :class:`PolyNeXt`.
        num_classes: Of the logits.
        in_channels: As for :class:`PolyNeXt`.
        drop_path_rate: As for :class:`PolyNeXt`.
        norm: As for :class:`PolyNeXt`.
        norm_size: As for :class:`PolyNeXt`.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        norm: str = 'ln',
        norm_size: int | Sequence[int] | None = None,
    ):
        super().__init__(arch, in_channels, drop_path_rate, norm=norm, norm_size=norm_size)
        last = len(self.arch.widths) - 1
        self.head = Classifier(self.arch.widths[-1], num_classes, norm=self.norm_maker(last))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override] # logits, not features
        """Return the logits (B, num_classes) of images (B, in_channels, H, W)."""
        *_, last = self.forward_stages(x)
        return self.head(last)
