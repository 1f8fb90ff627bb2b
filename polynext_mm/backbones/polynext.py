"""PolyNeXt as a backbone of mmseg, mmdet and whatever else looks into mmengine's root registry."""

import copy
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .. import nn as network
from ..nn.batch_norm import ChannelBatchNorm
from ..weights import loading, safe_reading


class OutNorm(nn.LayerNorm):
    """LN over the channels of (B, C, H, W), with weight and bias, never in half."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        # float() of a float64 tensor would narrow it
        x = x.permute(0, 2, 3, 1)
        x = super().forward(x if x.element_size() > 4 else x.float())
        return x.permute(0, 3, 1, 2)


class OutBatchNorm(ChannelBatchNorm):
    """The same of a fully polynomial network: ChannelBatchNorm of (B, C, H, W), with a bias."""

    def __init__(self, channels: int, *settings):
        super().__init__(channels, *settings)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1)) + self.bias
        return x.permute(0, 3, 1, 2)


@MODELS.register_module()
class PolyNeXt(network.PolyNeXt, BaseModule):
    """PolyNeXt backbone with multi-scale outputs.

    Args:
        arch (str | dict): 'cpolynext_t', '_s', '_b', '_l', 'apolynext_t', '_s', '_b', '_l', the
            low-resolution 'cpolynext_lr' with three stages, or a dict with the fields of
            ``polynext_mm.nn.Arch``.
        in_channels (int): Of the image. Defaults to 3.
        out_indices (Sequence[int] | None): Stages to return, from 0. Defaults to None: all.
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
        norm (str): 'ln', or 'bn' for the paper's fully polynomial network, whose inference is additions
            and multiplications, output norms included. Defaults to 'ln'.
        norm_size (int | Sequence[int] | None): For 'bn', side or (height, width) of the images that
            the norms' weights and statistics are for. A checkpoint tells another, and so does the first
            batch of a training in one process; in several, set the crop here. Defaults to None: 224.
        sync_norm (bool): For 'bn', statistics over all processes in training. Defaults to False.
        init_cfg (dict | list[dict] | None): ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` takes
            the authors' files and ours, strictly. Defaults to None.

    Raises:
        ValueError: For values that are not valid, naming those that are.

    Attributes:
        out_channels (tuple[int]): Of the outputs.
        out_strides (tuple[int]): Of the outputs; sizes are ceil(H / stride), ceil(W / stride).
    """

    def __init__(
        self,
        arch: str | Mapping = 'cpolynext_s',
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        out_norm: bool = True,
        with_cp: bool = False,
        grad_clip_norm: float | None = None,
        compile_cells: bool = False,
        norm: str = 'ln',
        norm_size: int | Sequence[int] | None = None,
        sync_norm: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        for name, value in (
            ('out_norm', out_norm),
            ('with_cp', with_cp),
            ('compile_cells', compile_cells),
        ):
            if not isinstance(value, bool):  # 'no' on a command line would mean yes
                raise ValueError(f'{name} must be True or False, got {value!r}')
        super().__init__(
            arch,
            in_channels,
            drop_path_rate,
            with_cp,
            grad_clip_norm,
            norm=norm,
            norm_size=norm_size,
            sync_norm=sync_norm,
        )
        self.init_cfg = copy.deepcopy(init_cfg)
        num_stages = len(self.stages)
        out_indices = range(num_stages) if out_indices is None else out_indices
        if (
            isinstance(out_indices, int)
            or not set(out_indices) <= set(range(num_stages))
            or (not out_indices or list(out_indices) != sorted(set(out_indices)))
        ):
            raise ValueError(
                f'out_indices must be ascending and of {tuple(range(num_stages))}, '
                f'got {out_indices!r}'
            )
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages must be within -1 (nothing), 0 (the stem), ..., '
                f'{num_stages} (everything), got {frozen_stages!r}'
            )
        self.out_indices = tuple(out_indices)
        self.out_channels = tuple(self.arch.widths[i] for i in self.out_indices)
        self.out_strides = tuple(self.arch.strides[i] for i in self.out_indices)
        self.frozen_stages = frozen_stages
        self.grad_clip_norm = grad_clip_norm
        self.loss_scale = None  # unknown until somebody says so
        self.out_norms = nn.ModuleDict()
        if out_norm:
            for index, channels in zip(self.out_indices, self.out_channels):
                self.out_norms[str(index)] = self._make_out_norm(index, channels)
        for module in self._frozen():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        if compile_cells:
            self.compile_cells()

    def _make_out_norm(self, stage: int, channels: int) -> nn.Module:
        if self.norm == 'ln':
            return OutNorm(channels)
        return OutBatchNorm(channels, *self._norm_maker(stage).settings)

    def _log(self, message: str) -> None:
        print_log(message, logger='current')

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images (B, in_channels, H, W), H and W from 32 up: one (B, C, ceil(H / stride),
        ceil(W / stride)) for each of ``out_indices``, in channels-last memory."""
        if min(x.shape[-2:]) < 32:
            raise ValueError(f'images must be at least 32x32, got {x.shape[-2]}x{x.shape[-1]}')
        if self.grad_clip_norm is not None and self.loss_scale is None:
            self._refuse_unknown_loss_scale(x.device.type)
        outs = []
        for index, feature in enumerate(self.forward_stages(x)):
            if index in self.out_indices:
                norm = str(index)
                outs.append(self.out_norms[norm](feature) if norm in self.out_norms else feature)
            if index == self.out_indices[-1]:
                break
        return tuple(outs)

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names, safely and strictly.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it cannot be fetched or read, or does not fit.
        """
        with safe_reading():
            super().init_weights()

    def train(self, mode: bool = True) -> 'PolyNeXt':
        """Frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

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

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *self.stages[: self.frozen_stages]]


def _adapt_state_dict(
    backbone: PolyNeXt, state_dict: dict, prefix: str, local_metadata: dict, *_
) -> None:
    source = local_metadata.get('source')
    print_log(loading.adapt(backbone, state_dict, prefix, source), logger='current')
