"""The files of the authors' release, as data.

Source: the release's page, whose address is the start of every url here.
"""

import dataclasses

_BASE = 'https://huggingface.co/JJWCactus/PolyNeXt/resolve/main/'


@dataclasses.dataclass(frozen=True)
class Published:
    """One file of the release.

    Args:
        file: Name of the file.
        arch: Its network, a name in ``polynext_mm.nn.ARCHS``.
        holds: 'imagenet', a backbone with its classifier, or 'ade20k', a UperNet segmentor.
        figure: Published top-1 accuracy or mIoU, in percent.
    """

    file: str
    arch: str
    holds: str
    figure: float

    @property
    def url(self) -> str:
        """Where the file is downloaded from."""
        return _BASE + self.file


#: The files by name; ``polynext://NAME`` stands for one wherever a checkpoint's path or url goes.
PUBLISHED: dict[str, Published] = {
    file.rpartition('.')[0]: Published(file, arch, holds, figure)
    for file, arch, holds, figure in (
        ('cpolynext_t.pt', 'cpolynext_t', 'imagenet', 80.2),
        ('cpolynext_s.pt', 'cpolynext_s', 'imagenet', 83.9),
        ('cpolynext_b.pt', 'cpolynext_b', 'imagenet', 84.7),
        ('cpolynext_l.pt', 'cpolynext_l', 'imagenet', 84.9),
        ('apolynext_t.pt', 'apolynext_t', 'imagenet', 80.9),
        ('apolynext_s.pt', 'apolynext_s', 'imagenet', 84.3),
        ('apolynext_b.pt', 'apolynext_b', 'imagenet', 84.9),
        ('apolynext_l.pt', 'apolynext_l', 'imagenet', 85.2),
        ('uper_cpolynexts.pth', 'cpolynext_s', 'ade20k', 50.6),
        ('uper_apolynexts.pth', 'apolynext_s', 'ade20k', 49.9),
    )
}
