"""PolyNeXt as a backbone of mmseg, mmdet and whatever else looks into mmengine's root registry."""

import os
from collections.abc import Mapping, Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor

from .. import nn as network
from ..weights import loading
from .multiscale import MultiScale, check_bools, refuse_pretrained


@MODELS.register_module()
class PolyNeXt(network.PolyNeXt, MultiScale):
    """PolyNeXt backbone for segmentors and detectors.

    Registered in mmengine's root registry, so a config of mmseg, mmdet or any other OpenMMLab
    library can name it once ``polynext_mm`` is imported::

        custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)
        model = dict(backbone=dict(_delete_=True, type='PolyNeXt', arch='cpolynext_s'))

    Published weights expect RGB images with the mean and standard deviation of ImageNet; see
    :mod:`polynext_mm.engine.normalization`.

    Args:
        arch: A published architecture ('cpolynext_t', 'cpolynext_s', 'cpolynext_b', 'cpolynext_l',
            'apolynext_t', 'apolynext_s', 'apolynext_b', 'apolynext_l'), or a dict with the fields
            of :class:`polynext_mm.nn.Arch`.
        in_channels: Channels of the input images.
        out_indices: Stages to return, from 0, in ascending order. List only stages that a neck or
            head uses: the norm of an unused output gets no gradient, and DistributedDataParallel
            stops in the second iteration (``MachineHook`` reports it before the first step).
            ``in_index`` of heads and ``in_channels`` of necks refer to the outputs listed here.
        drop_path_rate: Stochastic depth rate of the last cell; rates rise linearly from 0 at the
            first.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages, each with
            the downsampling before it. Output norms are never frozen.
        out_norm: Whether every output passes through a LayerNorm of its own, as in the authors'
            dense-prediction models.
        with_cp: Whether to checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Largest L2 norm of the gradient at the output of every cell (5 in the
            authors' recipe for APolyNeXt), or None. The norm is that of the unscaled loss, so a
            loss that is scaled needs :meth:`set_loss_scale`.
        compile_cells: Whether to compile the stacks of every cell with ``torch.compile``, for
            images of any size. The names of the weights do not change.
        weight_init: Where training from scratch starts. 'imagenet' is the initialization that the
            paper trains ImageNet with. 'trunc_normal' (std .02) is what the authors' segmentation
            code fills a network with before it loads a checkpoint; PolyConv branches then start
            close to zero, with hardly any gradient.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` loads a path, a url or a published
            file, in the authors' names or in ours, and checks every key. Other kinds of mmengine's
            initializers work too. None keeps ``weight_init``.
        pretrained: Must be None. mmseg's segmentors pass it on to their backbone.

    Attributes:
        out_channels: Channels of each output.
        out_strides: Stride of each output, one of 4, 8, 16 and 32.

    Raises:
        ValueError: If an argument is invalid; the message lists the valid choices.
        RuntimeError: If ``compile_cells`` is set and there is no C++ compiler.
    """

    scales = ('scale0', 'scale1', 'scale_logit', 'gate_logits')

    def __init__(
        self,
        arch: str | Mapping = 'cpolynext_s',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        out_norm: bool = True,
        with_cp: bool = False,
        grad_clip_norm: float | None = None,
        compile_cells: bool = False,
        weight_init: str = 'imagenet',
        init_cfg: dict | list[dict] | None = None,
        pretrained: None = None,
    ):
        refuse_pretrained(pretrained, f'polynext://{arch}' if isinstance(arch, str) else 'PATH')
        check_bools(out_norm=out_norm, with_cp=with_cp, compile_cells=compile_cells)
        super().__init__(arch, in_channels, drop_path_rate, with_cp, grad_clip_norm, weight_init)
        self.grad_clip_norm = grad_clip_norm
        self.set_outputs(
            self.arch.widths, self.arch.strides, out_indices, frozen_stages, out_norm, init_cfg
        )
        if compile_cells:
            self.compile_cells()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return one feature for each of ``out_indices``.

        Args:
            x: Images, (B, in_channels, H, W), with H and W of at least 32.

        Returns:
            Features (B, C, ceil(H / stride), ceil(W / stride)) in channels-last memory, float32 or
            wider where ``out_norm`` is set.

        Raises:
            ValueError: If the images are smaller, or if ``grad_clip_norm`` is set and the factor on
                the loss may not be 1 and was not given to :meth:`set_loss_scale`.
        """
        if self.grad_clip_norm is not None and self.loss_scale is None:
            self._refuse_unknown_loss_scale(x.device.type)
        return MultiScale.forward(self, x)

    def adapt(
        self, state_dict: dict[str, Tensor], prefix: str, source: str | os.PathLike | None = None
    ) -> str:
        return loading.adapt(self, state_dict, prefix, source)

    def get_layer_depth(self, param_name: str, prefix: str = 'backbone.') -> tuple[int, int]:
        """Return the depth of a parameter, for layer-wise learning rates.

        The stem has depth 0, every cell with the downsampling before it one more than the previous,
        and the output norms come last.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Prefix of the backbone's parameters in the model.

        Returns:
            The depth of the parameter, and the number of depths.
        """
        depths = self.arch.depths
        total = sum(depths) + 2
        parts = param_name.removeprefix(prefix).split('.')
        if parts[0] == 'stem':
            return 0, total
        if parts[0] != 'stages':
            return total - 1, total
        stage = int(parts[1])
        cell = int(parts[3]) if parts[2] == 'cells' else 0
        return 1 + sum(depths[:stage]) + cell, total

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor that the loss is multiplied by before backward.

        ``grad_clip_norm`` applies to gradients of the unscaled loss. ``AutocastOptimWrapper`` calls
        this in every iteration; a training loop that scales the loss itself must do so too.
        """
        self.loss_scale = scale

    def _refuse_unknown_loss_scale(self, device: str) -> None:
        # Autocast often comes with loss scaling: mmengine's AmpOptimWrapper scales for every dtype.
        if self.training and torch.is_grad_enabled() and torch.is_autocast_enabled(device):
            raise ValueError(
                'grad_clip_norm applies to gradients of the unscaled loss, and with autocast the '
                "loss may be scaled: use optim_wrapper=dict(type='AutocastOptimWrapper', ...), or "
                'call set_loss_scale(1.) if the loss is not scaled'
            )
