"""PolyNeXt as a backbone of mmseg, mmdet and whatever else looks into mmengine's root registry."""

import copy
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .. import nn as network
from ..weights import loading, safe_reading


class OutNorm(nn.LayerNorm):
    """LN over the channels of (B, C, H, W), with weight and bias, float32 or wider."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = super().forward(x if x.dtype is torch.float64 else x.float())
        return x.permute(0, 3, 1, 2)


@MODELS.register_module()
class PolyNeXt(network.PolyNeXt, BaseModule):
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
        init_cfg: ``dict(type='Pretrained', checkpoint='polynext://cpolynext_s')``, or a path or
            url, loads weights in the authors' names or in ours and checks every key. mmengine's
            other initializers work too. None keeps ``weight_init``.
        pretrained: Must be None. mmseg's segmentors pass it on to their backbone.

    Attributes:
        out_channels: Channels of each output.
        out_strides: Stride of each output, one of 4, 8, 16 and 32.

    Raises:
        ValueError: If an argument is invalid; the message lists the valid choices.
        RuntimeError: If ``compile_cells`` is set and there is no C++ compiler.
    """

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
        if pretrained is not None:
            checkpoint = f'polynext://{arch}' if isinstance(arch, str) else 'PATH'
            raise ValueError(
                f'pretrained={pretrained!r}: the weights of a PolyNeXt are set by init_cfg. Write '
                'pretrained=None in the model, and in its backbone '
                f"init_cfg=dict(type='Pretrained', checkpoint='{checkpoint}'), or no init_cfg to "
                'train from scratch'
            )
        for name, value in (
            ('out_norm', out_norm),
            ('with_cp', with_cp),
            ('compile_cells', compile_cells),
        ):
            if not isinstance(value, bool):  # the string 'no' would count as true
                raise ValueError(f'{name} must be True or False, got {value!r}')
        super().__init__(arch, in_channels, drop_path_rate, with_cp, grad_clip_norm, weight_init)
        self.init_cfg = copy.deepcopy(init_cfg)
        num_stages = len(self.stages)
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
        self.out_norms = nn.ModuleDict()
        if out_norm:
            for index, channels in zip(self.out_indices, self.out_channels):
                self.out_norms[str(index)] = OutNorm(channels)
        for module in self._frozen():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
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
        """Initialize as ``init_cfg`` says, reading checkpoints safely and strictly.

        Raises:
            FileNotFoundError: If the checkpoint is a path that does not exist.
            CheckpointError: If the checkpoint cannot be downloaded or read, or does not fit.
        """
        with safe_reading():
            super().init_weights()

    def train(self, mode: bool = True) -> 'PolyNeXt':
        """Set the training mode; frozen stages stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

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

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *self.stages[: self.frozen_stages]]


def _adapt_state_dict(
    backbone: PolyNeXt, state_dict: dict, prefix: str, local_metadata: dict, *_
) -> None:
    source = local_metadata.get('source')
    print_log(loading.adapt(backbone, state_dict, prefix, source), logger='current')
