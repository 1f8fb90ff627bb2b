"""PolyNeXt as a backbone of mmseg, mmdet and whatever else looks into mmengine's root registry."""

from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor

from .. import nn as network
from ..weights import loading
from .multiscale import MultiScale, check_bools


@MODELS.register_module()
class PolyNeXt(network.PolyNeXt, MultiScale):
    """PolyNeXt backbone with multi-scale outputs.

    Args:
        arch (str | dict): 'cpolynext_t', '_s', '_b', '_l', 'apolynext_t', '_s', '_b', '_l', or a dict
            with the fields of ``polynext_mm.nn.Arch``.
        in_channels (int): Of the image. Defaults to 3.
        out_indices (Sequence[int]): Stages to return, from 0. Defaults to all four.
        drop_path_rate (float): Stochastic depth of the last cell; rises linearly from 0. Defaults to 0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and the first k stages with the
            downsampling before each of them. Output norms are never frozen. Defaults to -1.
        out_norm (bool): Pass every output through an LN of its own, as the authors do for dense
            prediction. Defaults to True.
        with_cp (bool): Checkpoint every cell in training: less memory, more time. Defaults to False.
        grad_clip_norm (float | None): In backward, scale the gradient at every cell's output to at most
            this L2 norm (the authors' A recipe: 5). Needs the scale of the loss:
            :meth:`set_loss_scale`. Defaults to None.
        compile_cells (bool): Compile the stacks of every cell with torch.compile, for any size. Names of
            weights do not change. Defaults to False.
        init_cfg (dict | list[dict] | None): ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` takes
            the authors' files and ours, strictly. Defaults to None.

    Raises:
        ValueError: For values that are not valid, naming those that are.

    Attributes:
        out_channels (tuple[int]): Of the outputs.
        out_strides (tuple[int]): Of the outputs; sizes are ceil(H / stride), ceil(W / stride).
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
        init_cfg: dict | list[dict] | None = None,
    ):
        check_bools(out_norm=out_norm, with_cp=with_cp, compile_cells=compile_cells)
        super().__init__(arch, in_channels, drop_path_rate, with_cp, grad_clip_norm)
        self.grad_clip_norm = grad_clip_norm
        self.loss_scale = None  # unknown until somebody says so
        self.set_outputs(
            self.arch.widths, self.arch.strides, out_indices, frozen_stages, out_norm, init_cfg
        )
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        if compile_cells:
            self.compile_cells()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images (B, in_channels, H, W), H and W from 32 up: one (B, C, ceil(H / stride),
        ceil(W / stride)) for each of ``out_indices``, in channels-last memory."""
        if self.grad_clip_norm is not None and self.loss_scale is None:
            self._refuse_unknown_loss_scale(x.device.type)
        return MultiScale.forward(self, x)

    def get_layer_depth(self, param_name: str, prefix: str = 'backbone.') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rates: 0 the stem, then one a cell with the
        downsampling before it, output norms last.

        Args:
            param_name (str): Name of the parameter in the whole model.
            prefix (str): Of the backbone in the model. Defaults to 'backbone.'.

        Returns:
            tuple[int, int]: Its depth, and the number of depths.
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
        """Tell the per-cell clip the factor on the loss, for it counts norms of the unscaled one.

        ``AutocastOptimWrapper`` does this; a training loop of one's own that scales the loss must.
        """
        self.loss_scale = scale

    def _refuse_unknown_loss_scale(self, device: str) -> None:
        # whoever autocasts may scale the loss too, as mmengine's AmpOptimWrapper does for any dtype
        if self.training and torch.is_grad_enabled() and torch.is_autocast_enabled(device):
            raise ValueError(
                'grad_clip_norm clips gradients of the unscaled loss, and under autocast '
                'the scale of the loss is not known: use optim_wrapper=dict('
                "type='AutocastOptimWrapper', ...), or call set_loss_scale(1.) if the "
                'loss is not scaled'
            )


def _adapt_state_dict(
    backbone: PolyNeXt, state_dict: dict, prefix: str, local_metadata: dict, *_
) -> None:
    source = local_metadata.get('source')
    print_log(loading.adapt(backbone, state_dict, prefix, source), logger='current')
