"""PolyNeXt as a backbone for mmseg, mmdet and everything that uses mmengine's root registry."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..compat.torch_features import autocast_dtype
from ..nn import PolyNeXt as PolyNeXtNetwork
from ..nn.batch_norm import ChannelBatchNorm
from ..nn.ops.precision import wide
from ..weights import loading
from .multiscale import MultiScale, OutNorm, check_bools, refuse_pretrained


class OutBatchNorm(ChannelBatchNorm):
    """ChannelBatchNorm of (B, C, H, W) with a bias, for fully polynomial networks."""

    def __init__(self, channels: int, *settings):
        super().__init__(channels, *settings)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(wide(x.permute(0, 2, 3, 1))) + self.bias
        return x.permute(0, 3, 1, 2)


@MODELS.register_module()
class PolyNeXt(PolyNeXtNetwork, MultiScale):
    """PolyNeXt backbone for segmentors and detectors.

    Registered in mmengine's root registry, so a config of mmseg, mmdet or another OpenMMLab
    library can name it once ``polynext_mm`` is imported::

        custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)
        model = dict(backbone=dict(_delete_=True, type='PolyNeXt', arch='cpolynext_s'))

    Published weights expect RGB images with the mean and standard deviation of ImageNet, or those
    of 'cpolynext_lr' with the ones of CIFAR-10; see :mod:`polynext_mm.normalization`.

    Args:
        arch: A published architecture ('cpolynext_t', 'cpolynext_s', 'cpolynext_b', 'cpolynext_l',
            'apolynext_t', 'apolynext_s', 'apolynext_b', 'apolynext_l', or 'cpolynext_lr' with three
            stages, for small images), or a dict with the fields of :class:`polynext_mm.nn.Arch`.
        in_channels: Channels of the input images.
        out_indices: Stages to return, from 0, in ascending order; None for all. List only stages
            that a neck or head uses: the norm of an unused output gets no gradient, and
            DistributedDataParallel stops in the second iteration (``TrainingCheckHook`` reports it
            before the first step). ``in_index`` of heads and ``in_channels`` of necks refer to the
            outputs listed here.
        drop_path_rate: Stochastic depth rate of the last cell; rates rise linearly from 0 at the
            first.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages, each with
            the downsampling before it. Output norms are never frozen.
        out_norm: Whether every output passes through a LayerNorm of its own, as in the authors'
            dense-prediction models.
        out_contiguous: Whether to return outputs in contiguous memory instead of channels-last: one
            copy each, for heads that ``.view`` across channels.
        adapt_stem: Whether to adapt the stem of files for three channels to ``in_channels``, as
            timm does: their kernels are summed for one channel, and repeated and scaled by
            3 / ``in_channels`` for others.
        with_cp: Whether to checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Largest L2 norm of the gradient at the output of every cell (5 in the
            authors' recipe for APolyNeXt), or None. The norm is that of the unscaled loss, so a
            loss that is scaled needs :meth:`set_loss_scale`.
        compile_cells: Whether to compile the stacks of every cell with ``torch.compile``, for
            images of any size. The names of the weights do not change. 'reduce-overhead' records
            CUDA graphs of the compiled stacks too, for every size of image that comes: fewer
            launches, more memory.
        weight_init: Where training from scratch starts. 'imagenet' is the initialization that the
            paper trains ImageNet with. 'trunc_normal' (std .02) is what the authors' segmentation
            code fills a network with before it loads a checkpoint; PolyConv branches then start
            close to zero, with hardly any gradient.
        norm: 'ln', or 'bn' for the paper's fully polynomial network, whose inference is additions
            and multiplications, output norms included.
        norm_size: For 'bn', the side or (height, width) of the images that the norms' weights and
            statistics are for; 224 if None. A checkpoint brings its own, and a training in one
            process takes that of its first batch; for several processes, set the crop here.
        sync_norm: For 'bn', whether training takes statistics over the batches of all processes.
        init_cfg: ``dict(type='Pretrained', checkpoint='polynext://cpolynext_s')``, or a path or
            url, loads weights in the authors' names or in ours and checks every key. mmengine's
            other initializers work too. None keeps ``weight_init``.
        pretrained: Must be None. mmseg's segmentors pass it on to their backbone.

    Attributes:
        out_channels: Channels of each output.
        out_strides: Stride of each output.

    Raises:
        ValueError: If an argument is invalid; the message lists the valid choices.
        RuntimeError: If ``compile_cells`` is set and there is no C++ compiler.
    """

    scales = ('scale0', 'scale1', 'scale_logit', 'gate_logits')

    def __init__(
        self,
        arch: str | Mapping = 'cpolynext_s',
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        out_norm: bool = True,
        out_contiguous: bool = False,
        adapt_stem: bool = False,
        with_cp: bool = False,
        grad_clip_norm: float | None = None,
        compile_cells: bool | str = False,
        weight_init: str = 'imagenet',
        norm: str = 'ln',
        norm_size: int | Sequence[int] | None = None,
        sync_norm: bool = False,
        init_cfg: dict | list[dict] | None = None,
        pretrained: None = None,
    ):
        name = f'{arch}_bn' if norm == 'bn' else arch
        refuse_pretrained(pretrained, f'polynext://{name}' if isinstance(arch, str) else 'PATH')
        check_bools(with_cp=with_cp)
        if type(compile_cells) is not bool and compile_cells != 'reduce-overhead':
            raise ValueError(
                f"compile_cells must be True, False or 'reduce-overhead', got {compile_cells!r}"
            )
        super().__init__(
            arch,
            in_channels,
            drop_path_rate,
            with_cp,
            grad_clip_norm,
            weight_init,
            norm,
            norm_size,
            sync_norm,
        )
        self.grad_clip_norm = grad_clip_norm
        if out_indices is None:
            out_indices = range(len(self.stages))
        self.set_outputs(
            self.arch.widths,
            self.arch.strides,
            out_indices,
            frozen_stages,
            out_norm,
            out_contiguous,
            adapt_stem,
            init_cfg,
        )
        if compile_cells:
            self.compile_cells('default' if compile_cells is True else compile_cells)

    def make_out_norm(self, stage: int, channels: int) -> nn.Module:
        if self.norm == 'ln':
            return OutNorm(channels)
        return OutBatchNorm(channels, *self.batch_norms(stage).settings)

    def _log(self, message: str) -> None:
        print_log(message, logger='current')

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return one feature for each of ``out_indices``.

        Args:
            x: Images, (B, in_channels, H, W), with H and W of at least 32.

        Returns:
            Features (B, C, ceil(H / stride), ceil(W / stride)), in channels-last memory unless
            ``out_contiguous`` is set, float32 or wider where ``out_norm`` is.

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
        return loading.adapt(self, state_dict, prefix, source, self.adapt_stem)

    def set_loss_scale(self, scale: float | Tensor) -> None:
        """Set the factor that the loss is multiplied by before backward.

        A scalar tensor on the device does not cause a synchronization. New values are copied into
        the same tensor, so that a CUDA graph reads the current one.

        ``grad_clip_norm`` applies to gradients of the unscaled loss. ``AutocastOptimWrapper`` calls
        this in every iteration; a training loop that scales the loss itself must do so too.
        """
        place = self.loss_scale
        if isinstance(place, Tensor) and isinstance(scale, Tensor) and place.device == scale.device:
            place.copy_(scale)
        else:
            self.loss_scale = scale

    def _refuse_unknown_loss_scale(self, device: str) -> None:
        # Autocast often comes with loss scaling: mmengine's AmpOptimWrapper scales for every dtype.
        if self.training and torch.is_grad_enabled() and autocast_dtype(device):
            raise ValueError(
                'grad_clip_norm applies to gradients of the unscaled loss, and with autocast the '
                "loss may be scaled: use optim_wrapper=dict(type='AutocastOptimWrapper', ...), or "
                'call set_loss_scale(1.) if the loss is not scaled'
            )
