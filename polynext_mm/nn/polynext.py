"""The network: stem and stages, in plain torch.

Source: "Activation-Free Backbones for Image Recognition: Polynomial Alternatives within
MetaFormer-Style Vision Models" (ICML 2026, arXiv 2605.20839) and its authors' release. The same
network, unoptimized, is :mod:`polynext_mm.nn.plain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .arch import Arch, get_arch, is_number
from .batch_norm import NormSizes, PositionNorm, checked_norm_size, map_size
from .cell import Cell, Stage
from .compiling import compile_stacks
from .initialization import WEIGHT_INITS, initialize
from .layers import Branch, LayerNorm, MakeNorm
from .stock import is_stock


class PolyNeXt(NormSizes):
    """Stem and stages.

    Args:
        arch: A name of :data:`ARCHS`, or a custom arch.
        in_channels: Channels of the image.
        drop_path_rate: Drop path rate of the last cell; rates rise linearly from 0 at the first.
        with_cp: Checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Per-cell clip of the gradient in backward (the authors' A recipe: 5).
        weight_init: How training from scratch starts. 'imagenet': as in the paper's ImageNet
            training, Kaiming normal in PolyConv, PolyMLP and downsampling, PyTorch's default
            elsewhere. 'trunc_normal': as in the release's dense-prediction code before it loads a
            checkpoint, std .02; PolyConv branches then start close to zero.
        norm: 'ln', or 'bn' for the paper's fully polynomial network, whose inference is additions
            and multiplications: ChannelBatchNorm instead of LN, and attention divided by a running
            average of its row sums.
        norm_size: For 'bn', the side, or height and width, of the images that the norms' weights
            and statistics are for; 224 by default. For images of other sizes they are resized.
            Loading a state dict changes it to that of the weights. The first batch of a training
            changes it to the size of its images, except with several processes.
        sync_norm: For 'bn', take statistics over the batches of all processes in training.

    Raises:
        ValueError: For an unknown arch or a value out of range.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        grad_clip_norm: float | None = None,
        weight_init: str = 'imagenet',
        norm: str = 'ln',
        norm_size: int | Sequence[int] | None = None,
        sync_norm: bool = False,
    ):
        super().__init__()
        if not is_number(drop_path_rate) or not 0 <= drop_path_rate <= 1:
            raise ValueError(f'drop_path_rate must be within [0, 1], got {drop_path_rate!r}')
        if type(in_channels) is not int or in_channels < 1:
            raise ValueError(f'in_channels must be a positive integer, got {in_channels!r}')
        if grad_clip_norm is not None and not (is_number(grad_clip_norm) and grad_clip_norm > 0):
            raise ValueError(f'grad_clip_norm must be positive or None, got {grad_clip_norm!r}')
        if weight_init not in WEIGHT_INITS:
            choices = tuple(WEIGHT_INITS)
            raise ValueError(f'weight_init must be one of {choices}, got {weight_init!r}')
        self.arch = get_arch(arch)
        self.weight_init = weight_init
        self.loss_scale: float | Tensor | None = None
        self.compile_mode: str | None = None
        self.set_norm(norm, norm_size, sync_norm)
        size = self.arch.stem_size
        self.stem = nn.Conv2d(
            in_channels, self.arch.widths[0], size, self.arch.stem_stride, size // 2, bias=False
        )
        last = max(1, sum(self.arch.depths) - 1)
        rates = (drop_path_rate * cell / last for cell in range(last + 1))
        stages = nn.ModuleList(
            Stage(
                self.arch,
                i,
                [next(rates) for _ in range(depth)],
                with_cp,
                grad_clip_norm,
                self.norm_maker(i),
            )
            for i, depth in enumerate(self.arch.depths)
        )
        self.stages = cast('Sequence[Stage]', stages)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize for training from scratch, matrices and kernels by ``weight_init``."""
        if not self.stem.weight.is_meta:  # torch is slow to draw numbers even for meta tensors
            initialize(self, self.weight_init)

    def norm_maker(self, stage: int) -> MakeNorm:
        """Return the maker of a stage's norms."""
        return LayerNorm if self.norm == 'ln' else self.batch_norms(stage)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature of every stage.

        Args:
            x: Images, (B, in_channels, H, W).

        Yields:
            (B, C, ceil(H / stride), ceil(W / stride)) in channels-last memory, from stride 4 to 32
            (low resolution: from 1 to 4).
        """
        self.settle_norm_size(x)
        if self.compile_mode == 'reduce-overhead':
            # otherwise every stack's CUDA graph would begin a new step and overwrite its own input
            torch.compiler.cudagraph_mark_step_begin()
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        s0 = x.permute(0, 2, 3, 1).contiguous()
        s1 = s0.view_as(s0)  # another tensor: Dynamo rejects the same one passed twice
        loss_scale = 1.0 if self.loss_scale is None else self.loss_scale
        for stage in self.stages:
            s0, s1 = stage(s0, s1, loss_scale)
            yield s1.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of all stages."""
        return list(self.forward_stages(x))

    def cells(self) -> list[Cell]:
        """Return all cells, in order."""
        return [cell for stage in self.stages for cell in stage.cells]

    def compile_cells(self, mode: str = 'default') -> PolyNeXt:
        """Compile the stacks of every cell, for images of any size.

        Equal stacks share their code, and the names of weights do not change.

        Args:
            mode: As for ``torch.compile``: 'default', or 'reduce-overhead', which records a CUDA
                graph of every stack for every size of image, and on other devices is the default.

        Raises:
            ValueError: For another mode.
            RuntimeError: With torch before 2.12, whose compiler fails in training on maps of
                dynamic size, and without a C++ compiler.
        """
        compile_stacks([stack for cell in self.cells() for stack in cell.stacks], mode)
        self.compile_mode = mode
        return self

    def fuse(self, size: int | Sequence[int] | None = None) -> PolyNeXt:
        """Fold gates, attention scales and scales of norms into neighbouring weights, in place.

        This is for deployment: outputs are the same up to rounding; it cannot be undone, and the
        network cannot be trained afterwards.

        With ``norm='bn'``, norms are then a multiplication and an addition per position. The
        constants of one image size are kept as buffers, and a graph exported at this size consists
        of additions and multiplications only. For images of other sizes they are still resized, and
        not folded.

        Args:
            size: With ``norm='bn'``, the side, or height and width, of these images; by default
                :attr:`norm_size`. Fusing again chooses another.

        Raises:
            ValueError: For a size with ``norm='ln'``, for an invalid size, and if a layer of a
                branch was replaced or has hooks.
        """
        at = self.norm_size if size is None else checked_norm_size(self.norm, size, False)
        for name, branch in self.named_modules():
            for key, layer in branch.named_children() if isinstance(branch, Branch) else ():
                if not is_stock(layer):
                    raise ValueError(
                        f'fuse() folds scales into weights, and {name}.{key} was replaced or has '
                        'hooks: merge adapters, remove parametrizations and hooks first'
                    )
        self.eval().requires_grad_(False)
        for cell in self.cells():
            cell.fuse()
        for norm in self.modules():
            if isinstance(norm, PositionNorm) and at is not None:
                norm.fuse(map_size(at, norm.stride))
        return self
