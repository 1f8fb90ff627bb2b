"""Whole segmentors: UperNet with its published heads, on backbones of PolyNeXt's size.

All but the backbone is the recipe of ADE20K (configs/upernet_cpolynext_s_ade20k.py). Weights are
random and nothing is downloaded, no path is dropped, and images are segmented whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polynext_mm.nn import ARCHS
from polynext_mm.resources import find_config

_CONVNEXT = dict(type='TIMMBackbone', pretrained=False)
_CONVNEXT_WIDTHS = (96, 192, 384, 768)
#: The peers' backbones, as they are set in mmseg's configs, and the widths of their features.
PEERS = {
    'convformer_s18': (dict(type='MetaFormer', arch='convformer_s18'), (64, 128, 320, 512)),
    'caformer_s18': (dict(type='MetaFormer', arch='caformer_s18'), (64, 128, 320, 512)),
    'convnext_tiny': (dict(_CONVNEXT, model_name='convnext_tiny'), _CONVNEXT_WIDTHS),
    'convnext_small': (dict(_CONVNEXT, model_name='convnext_small'), _CONVNEXT_WIDTHS),
    'swin_tiny': (dict(type='SwinTransformer', drop_path_rate=0.0), (96, 192, 384, 768)),
}
BACKBONES = (*ARCHS, *PEERS)


def build(name: str) -> nn.Module:
    """Return mmseg's segmentor on one of :data:`BACKBONES`, on the CPU, with BN for SyncBN.

    Raises:
        ImportError: Without mmseg, or without timm where the backbone is from there.
    """
    import mmseg.models  # noqa: F401 - registers
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    import polynext_mm.backbones  # noqa: F401 - registers

    settings = Config.fromfile(find_config('upernet_cpolynext_s_ade20k')).model
    if name in PEERS:
        settings.backbone, widths = PEERS[name]
    else:
        settings.backbone, widths = dict(type='PolyNeXt', arch=name), ARCHS[name].widths
    settings.decode_head.in_channels = list(widths)
    settings.auxiliary_head.in_channels = widths[2]
    settings.test_cfg = dict(mode='whole')
    init_default_scope('mmseg')
    return revert_sync_batchnorm(MODELS.build(settings))


def forward(model: nn.Module, images: Tensor, train: bool) -> Callable[[Tensor], object]:
    """Return what a segmentor computes of normalized images of one size.

    That is the class of every pixel, or in training the sum of its losses.
    """
    batch, _, *size = images.shape
    samples = [sample((size[0], size[1])).to(images.device) for _ in range(batch)]

    def loss(images: Tensor) -> Tensor:
        return model.parse_losses(model.loss(images, samples))[0]

    return loss if train else model.predict


def sample(size: tuple[int, int]):
    """Return what mmseg's data loaders say of an image: ten classes in stripes."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.linspace(0, 9.99, size[1]).long().expand(1, *size).contiguous()
    shapes = dict(img_shape=size, ori_shape=size, pad_shape=size)
    return SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=shapes)
