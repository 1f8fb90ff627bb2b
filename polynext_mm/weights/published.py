"""The files of the authors' release, as data.

Source: the release's page, whose address is the start of every url here.
"""

from __future__ import annotations

import dataclasses

_BASE = 'https://huggingface.co/JJWCactus/PolyNeXt/resolve/main/'


@dataclasses.dataclass(frozen=True)
class Published:
    """One file of the release.

    Args:
        file: Name of the file.
        arch: Its network, a name in ``polynext_mm.nn.ARCHS``.
        holds: 'imagenet', a backbone with its classifier, or 'ade20k', a UperNet segmentor; of the
            low-resolution network 'cifar10', 'svhn' or 'tiny_imagenet', with the classifier too.
        figure: Published top-1 accuracy or mIoU, in percent.
        norm: 'ln', or 'bn' for a fully polynomial network.
        sha256: SHA-256 of the file, in hexadecimal digits; None if unknown.
        size: Size of the file, in bytes; None if unknown.
    """

    file: str
    arch: str
    holds: str
    figure: float
    norm: str = 'ln'
    sha256: str | None = None
    size: int | None = None

    @property
    def url(self) -> str:
        """Url of the file."""
        return _BASE + self.file


# The release publishes no checksums or sizes; if it does, they belong here beside the figures.
#: The files by name; ``polynext://NAME`` stands for one wherever a checkpoint's path or url goes.
PUBLISHED: dict[str, Published] = {
    file.rpartition('.')[0]: Published(file, arch, holds, figure, norm[0] if norm else 'ln')
    for file, arch, holds, figure, *norm in (
        ('cpolynext_t.pt', 'cpolynext_t', 'imagenet', 80.2),
        ('cpolynext_s.pt', 'cpolynext_s', 'imagenet', 83.9),
        ('cpolynext_b.pt', 'cpolynext_b', 'imagenet', 84.7),
        ('cpolynext_l.pt', 'cpolynext_l', 'imagenet', 84.9),
        ('apolynext_t.pt', 'apolynext_t', 'imagenet', 80.9),
        ('apolynext_s.pt', 'apolynext_s', 'imagenet', 84.3),
        ('apolynext_b.pt', 'apolynext_b', 'imagenet', 84.9),
        ('apolynext_l.pt', 'apolynext_l', 'imagenet', 85.2),
        ('cpolynext_t_bn.pt', 'cpolynext_t', 'imagenet', 78.3, 'bn'),
        ('cpolynext_s_bn.pt', 'cpolynext_s', 'imagenet', 82.7, 'bn'),
        ('apolynext_t_bn.pt', 'apolynext_t', 'imagenet', 78.0, 'bn'),
        ('cpolynext_lr_cifar10.pt', 'cpolynext_lr', 'cifar10', 97.1),
        ('cpolynext_lr_svhn.pt', 'cpolynext_lr', 'svhn', 98.1),
        ('cpolynext_lr_tiny_imagenet.pt', 'cpolynext_lr', 'tiny_imagenet', 74.0),
        ('uper_cpolynexts.pth', 'cpolynext_s', 'ade20k', 50.6),
        ('uper_apolynexts.pth', 'apolynext_s', 'ade20k', 49.9),
    )
}
