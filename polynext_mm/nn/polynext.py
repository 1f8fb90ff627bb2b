"""PolyNeXt: stacks, cells, stages and the network, in torch alone.

Source: "Activation-Free Backbones for Image Recognition: Polynomial Alternatives within
MetaFormer-Style Vision Models" (ICML 2026, arXiv 2605.20839) and its authors' release. The same
network without a thought of time and memory is :mod:`polynext_mm.nn.plain`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.checkpoint import checkpoint

from ..compat.torch_features import COMPILE_CELLS, is_compiling
from . import ops
from .arch import Arch, get_arch, is_number
from .batch_norm import BatchNorms, PositionNorm, many_processes, map_size
from .layers import HEAD_WIDTH, DepthwiseConv, LayerNorm, MakeNorm, PolyAttn, PolyConv, PolyMLP
from .ops import dispatch

WEIGHT_INITS = ('imagenet', 'trunc_normal')
COMPILE_MODES = ('default', 'reduce-overhead')  # those of torch.compile
NORMS = ('ln', 'bn')
NORM_SIZE = 224  # of the released fully polynomial networks


class Stack(nn.Module):
    """A mixer and a PolyMLP on the residual stream.

    Args:
        arch: The network's.
        stage: Which of its stages, from 0.
        norm: Makes the norms.
    """

    def __init__(self, arch: Arch, stage: int, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = arch.widths[stage]
        if arch.mixers[stage] == 'attn':
            self.mixer = PolyAttn(width, norm)
        else:
            self.mixer = PolyConv(width, arch.conv_ratios[stage], arch.coarse_sizes[stage], norm)
        self.mlp = PolyMLP(width, arch.mlp_ratios[stage], norm)

    def forward(
        self,
        x: Tensor,
        gates: tuple[Tensor | None, Tensor | None] = (None, None),
        keep: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Add both branches to the residual stream.

        Args:
            x: (B, H, W, C).
            gates: sigmoid(lam) of the mixer and of the PolyMLP, scalars, or None for 1.
            keep: Factors of drop path of both, (2, B, 1, 1, 1), or None for 1.
            out: Where the results may be written, as of :meth:`Branch.forward`.
        """
        keep_mixer, keep_mlp = (None, None) if keep is None else keep.unbind()
        x = self.mixer(x, gates[0], keep_mixer, out)  # x + keep * gate * mixer(x)
        return self.mlp(x, gates[1], keep_mlp, out)  # x + keep * gate * PolyMLP(x)

    def fuse(self, gates: tuple[Tensor, Tensor]) -> None:
        self.mixer.fuse(gates[0])
        self.mlp.fuse(gates[1])


class Cell(nn.Module):
    """Map the running pair (s0, s1) to the next feature (paper, cell)::

        x = LN(a0 * s0 + a1 * s1)
        for each stack:
            x = x + sigmoid(lam[m]) * DropPath(mixer(x))
            x = x + sigmoid(lam[p]) * DropPath(PolyMLP(x))

    Args:
        arch: The network's.
        stage: Which of its stages, from 0.
        drop_path_rate: Of every branch.
        norm: Makes the norms.
    """

    def __init__(self, arch: Arch, stage: int, drop_path_rate: float, norm: MakeNorm = LayerNorm):
        super().__init__()
        width = arch.widths[stage]
        self.drop_path_rate = drop_path_rate
        self.scale0 = nn.Parameter(torch.ones(width))
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm = norm(width)
        self.gate_logits = nn.Parameter(torch.tensor(arch.gate_init, dtype=torch.float32))
        self.stacks = nn.ModuleList(Stack(arch, stage, norm) for _ in range(arch.stacks[stage]))
        self._gate_indices = [arch.gates(i) for i in range(arch.stacks[stage])]

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        if isinstance(self.norm, LayerNorm):
            x = ops.norm_of_pair(s0, s1, self.scale0, self.scale1, self.norm.weight)
        else:
            x = self.norm(self.scale0 * s0 + self.scale1 * s1)
        out = x if self._may_overwrite(x) else None
        for stack, gates in zip(self.stacks, self._gates()):
            x = stack(x, gates, self._keep(x), out)
        return x

    def _may_overwrite(self, x: Tensor) -> bool:
        """Return whether all stacks may write into ``x``, which is this cell's own.

        On CPUs that takes .96 of the time in inference (C-S and A-S at 512x512, two cores). Hooks
        must see the maps as they were, and compilers plan memory themselves. No branch of a fully
        polynomial network would write there.
        """
        if x.device.type != 'cpu' or torch.is_grad_enabled() or is_compiling():
            return False
        hooked = _global_forward_hooks or _global_forward_pre_hooks
        if hooked or not isinstance(self.norm, LayerNorm):
            return False
        seeing = [self]
        for stack in self.stacks:
            seeing += stack, stack.mixer, stack.mlp
        return not any(
            module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl
            for module in seeing
        )

    def _gates(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return sigmoid(lam) of every stack's branches; None where it was fused."""
        if self.gate_logits is None:
            return [(None, None)] * len(self.stacks)
        gates = self.gate_logits.sigmoid().unbind()
        return [(gates[mixer], gates[mlp]) for mixer, mlp in self._gate_indices]

    def _keep(self, x: Tensor) -> Tensor | None:
        """Draw the factors of drop path (stochastic depth) for both branches of a stack.

        A branch is dropped for whole samples, and scaled for the others; None stands for 1.
        """
        if not self.training or self.drop_path_rate == 0:
            return None
        rate = 1 - self.drop_path_rate
        keep = x.new_empty(2, len(x), 1, 1, 1).bernoulli_(rate)
        return keep / rate if rate > 0 else keep

    @torch.no_grad()
    def fuse(self) -> None:
        if self.gate_logits is None:
            return
        for stack, gates in zip(self.stacks, self._gates()):
            stack.fuse(gates)
        self.gate_logits = None
        if isinstance(self.norm, PositionNorm):
            self.norm.fold_back(self.scale0, self.scale1)


class Downsample(nn.Module):
    """Halve the resolution of (B, H, W, C), rounding up, and change its width.

    Args:
        kind: 'sep3x3', a depthwise 3x3 convolution and a 1x1, or 'full3x3', a dense one.
        in_channels: C.
        out_channels: The width of the next stage.
    """

    def __init__(self, kind: str, in_channels: int, out_channels: int):
        super().__init__()
        if kind == 'sep3x3':
            self.depthwise = nn.Conv2d(
                in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False
            )
            self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for conv in self.children():
            x = conv(x)
        return x.permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Downsampling of the pair (none before the first stage) and the cells of one resolution.

    Args:
        arch: The network's.
        index: Which of its stages, from 0.
        drop_path_rates: One for each cell.
        with_cp: Checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Largest norm of the gradient at a cell's output, or None.
        norm: Makes the norms.
    """

    def __init__(
        self,
        arch: Arch,
        index: int,
        drop_path_rates: list[float],
        with_cp: bool,
        grad_clip_norm: float | None,
        norm: MakeNorm = LayerNorm,
    ):
        super().__init__()
        self.with_cp = with_cp
        self.grad_clip_norm = grad_clip_norm
        if index > 0:
            self.downsample = nn.ModuleList(
                Downsample(kind, arch.widths[index - 1], arch.widths[index])
                for kind in arch.downsampling
            )
        else:
            self.downsample = None
        self.cells = nn.ModuleList(Cell(arch, index, rate, norm) for rate in drop_path_rates)

    def forward(
        self, s0: Tensor, s1: Tensor, loss_scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Map the pair to the last two features.

        Args:
            s0: The older map of the pair, (B, H, W, C).
            s1: The newer one.
            loss_scale: The factor on the loss, for the clip of the gradient alone.
        """
        if self.downsample is not None:
            s0, s1 = (shrink(s) for shrink, s in zip(self.downsample, (s0, s1)))
        for cell in self.cells:
            s0, s1 = s1, self._clipped(self._call(cell, s0, s1), loss_scale)
        return s0, s1

    def _call(self, cell: Cell, s0: Tensor, s1: Tensor) -> Tensor:
        if not (self.with_cp and torch.is_grad_enabled()):
            return cell(s0, s1)
        # without need, for a compiler takes no functions of ours here
        tracks = isinstance(cell.norm, PositionNorm)
        needed = tracks or dispatch.plain_wanted()
        options = {'context_fn': dispatch.checkpoint_contexts} if needed else {}
        return checkpoint(cell, s0, s1, use_reentrant=False, **options)

    def _clipped(self, x: Tensor, loss_scale: float | Tensor) -> Tensor:
        if self.grad_clip_norm is None or not x.requires_grad or dispatch.exporting():
            return x
        return ops.clip_gradient(x, self.grad_clip_norm, loss_scale)


class PolyNeXt(nn.Module):
    """Stem and stages.

    Args:
        arch: A name of :data:`ARCHS`, or a custom arch.
        in_channels: Of the image.
        drop_path_rate: Of the last cell; the rates rise linearly from 0 at the first.
        with_cp: Checkpoint every cell in training: less memory, more time.
        grad_clip_norm: Per-cell clip of the gradient in backward (the authors' A recipe: 5).
        weight_init: Where training from scratch starts. 'imagenet': as the paper's ImageNet
            training, Kaiming normal in PolyConv, PolyMLP and downsampling, PyTorch's default
            elsewhere. 'trunc_normal': as the release's dense-prediction code before it loads a
            checkpoint, std .02; with it the branch of a PolyConv starts dead.
        norm: 'ln', or 'bn' for the paper's fully polynomial network, whose inference is additions
            and multiplications: ChannelBatchNorm instead of LN, and attention divided by a running
            average of its row sums.
        norm_size: For 'bn', the side, or height and width, of the images that the norms' weights
            and statistics are for; 224 by default. A state dict that is loaded tells another.
            Images of other sizes get resized ones. The first batch of a training makes its size
            this one, except in several processes, where it stays the one given here.
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
            raise ValueError(f'weight_init must be one of {WEIGHT_INITS}, got {weight_init!r}')
        self.arch = get_arch(arch)
        self.weight_init = weight_init
        self.norm = norm
        self.loss_scale: float | Tensor | None = None
        self.compile_mode: str | None = None
        self._given_norm_size = _checked_norm_size(norm, norm_size, sync_norm)
        self._norm_size_is_settled = False
        self._sync_norm = sync_norm
        size = self.arch.stem_size
        self.stem = nn.Conv2d(
            in_channels, self.arch.widths[0], size, self.arch.stem_stride, size // 2, bias=False
        )
        last = max(1, sum(self.arch.depths) - 1)
        rates = (drop_path_rate * cell / last for cell in range(last + 1))
        self.stages = nn.ModuleList(
            Stage(
                self.arch,
                i,
                [next(rates) for _ in range(depth)],
                with_cp,
                grad_clip_norm,
                self._norm_maker(i),
            )
            for i, depth in enumerate(self.arch.depths)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize for training from scratch, matrices and kernels by ``weight_init``."""
        for module in self.modules():
            if isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, PositionNorm):
                module.reset_parameters()
            elif isinstance(module, Cell):
                nn.init.ones_(module.scale0)
                nn.init.ones_(module.scale1)
                module.gate_logits.copy_(torch.tensor(self.arch.gate_init))
            elif isinstance(module, PolyAttn):
                module.scale_logit.fill_(-math.log(HEAD_WIDTH**0.5 - 1))  # logit of 32^-.5
            elif isinstance(module, (nn.Conv2d, nn.Linear, DepthwiseConv)):
                if self.weight_init == 'trunc_normal':
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:  # PyTorch's default
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if self.weight_init == 'imagenet':
            for module in self.modules():
                if isinstance(module, (PolyConv, PolyMLP, Downsample)):
                    for layer in module.children():
                        if not isinstance(layer, (LayerNorm, PositionNorm)):
                            nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')

    def _norm_maker(self, stage: int) -> MakeNorm:
        if self.norm == 'ln':
            return LayerNorm
        return BatchNorms(self._given_norm_size, self.arch.strides[stage], self._sync_norm)

    @property
    def norm_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the norms' statistics are for; None for 'ln'."""
        if self.norm == 'ln':
            return None
        norm = self.cells()[0].norm
        if norm.size == map_size(self._given_norm_size, norm.stride):
            return self._given_norm_size
        return tuple(side * norm.stride for side in norm.size)

    def position_shapes(self, image_size: tuple[int, int]) -> dict[str, torch.Size]:
        """Return the shapes at a size of image of what a state dict holds for every position."""
        return {
            f'{name}.{table}': torch.Size(
                (*getattr(norm, table).shape[:-2], *map_size(image_size, norm.stride))
            )
            for name, norm in self.named_modules()
            if isinstance(norm, PositionNorm)
            for table in norm.tables
        }

    def set_norm_size(self, size: int | Sequence[int]) -> None:
        """Resize the norms' weights and statistics for good.

        Parameters stay the same objects: an optimizer without state goes on with them.

        Args:
            size: The side, or height and width, of the images that they are for from now on.

        Raises:
            ValueError: With ``norm='ln'``, or for what is no size.
        """
        size = _checked_norm_size(self.norm, size, False)
        for norm in self.modules():
            if isinstance(norm, PositionNorm):
                norm.resize_(map_size(size, norm.stride))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)  # hooks may rename what is in it
        table = state_dict.get(f'{prefix}stages.0.cells.0.norm.position_weight')
        if self.norm == 'bn' and table is not None and table.ndim == 2:
            self.set_norm_size(tuple(side * self.arch.stem_stride for side in table.shape))

    def keep_norm_size(self) -> None:
        """Let the size of the norms stay as it is in training, as it must when one is resumed."""
        self._norm_size_is_settled = True

    def _settle_norm_size(self, image_size: tuple[int, int]) -> None:
        """Give the norms the size of the first batch of a training, once.

        DistributedDataParallel has taken the sizes of parameters when it wrapped them, so in
        several processes that size is the one from the constructor.
        """
        self._norm_size_is_settled = True
        fixed = many_processes()
        before, size = self.norm_size, self._given_norm_size if fixed else image_size
        if not self._same_maps(before, size):
            self.set_norm_size(size)
            self._log(
                "the norms' weights and statistics, for images of {}x{}, are resized to the {}x{} "
                'of {}'.format(*before, *size, 'norm_size' if fixed else 'this training')
            )
        if not self._same_maps(size, image_size):
            self._log(
                "the norms' weights and statistics stay those for images of {}x{}, resized for "
                'every map: to train them at {}x{} in several processes, set norm_size to that'
                ''.format(*size, *image_size)
            )

    def _same_maps(self, *image_sizes: tuple[int, int]) -> bool:
        """Return whether images of these sizes have maps of the same sizes."""
        return len({map_size(size, self.arch.stem_stride) for size in image_sizes}) == 1

    def _log(self, message: str) -> None:
        logging.getLogger(__name__).info(message)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature of every stage.

        Args:
            x: Images, (B, in_channels, H, W).

        Yields:
            (B, C, ceil(H / stride), ceil(W / stride)) in channels-last memory, from stride 4 to 32
            (low resolution: from 1 to 4).
        """
        if self.training and self.norm == 'bn' and not self._norm_size_is_settled:
            if not is_compiling():
                self._settle_norm_size(tuple(x.shape[-2:]))
        if self.compile_mode == 'reduce-overhead':
            # otherwise the graph of every stack would begin a step, and overwrite what it reads
            torch.compiler.cudagraph_mark_step_begin()
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        s0 = x.permute(0, 2, 3, 1).contiguous()
        s1 = s0.view_as(s0)  # the same as a second tensor, for Dynamo allows a Function none twice
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
            mode: As of ``torch.compile``: 'default', or 'reduce-overhead', which records a CUDA
                graph of every stack for every size of image, and on other devices is the default.

        Raises:
            ValueError: For another mode.
            RuntimeError: With torch before 2.12, whose compiler fails at maps of any size in
                training, and without a C++ compiler.
        """
        if mode not in COMPILE_MODES:
            raise ValueError(f'mode must be one of {COMPILE_MODES}, got {mode!r}')
        if not COMPILE_CELLS.is_there:
            raise RuntimeError(
                f'{COMPILE_CELLS.what_is_missing()}: upgrade torch, or leave compile_cells out'
            )
        require_compiler('torch.compile', ' or turn compilation off')
        # All stacks are one function to Dynamo. Its default of 8 versions is too few for four
        # stages, with and without drop path, in training and evaluation, and what exceeds the limit
        # runs uncompiled.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
        for cell in self.cells():
            for stack in cell.stacks:
                stack.compile(dynamic=True, mode=mode)
        self.compile_mode = mode
        return self

    def fuse(self, size: int | Sequence[int] | None = None) -> PolyNeXt:
        """Fold gates, attention scales and scales of norms into neighbouring weights, in place.

        For deployment: the outputs are the same to rounding, there is no way back, and no training.

        With ``norm='bn'``, what the norms do is then a multiplication and an addition for every
        position. Those of one size of image are kept as buffers, and a graph that is exported at
        this size holds additions and multiplications alone. Images of other sizes still get resized
        ones, which are not folded beforehand.

        Args:
            size: With ``norm='bn'``, the side, or height and width, of these images; by default
                :attr:`norm_size`. Fusing again chooses another.

        Raises:
            ValueError: For a size with ``norm='ln'``, or for what is no size.
        """
        if size is not None:
            size = _checked_norm_size(self.norm, size, False)
        self.eval().requires_grad_(False)
        for cell in self.cells():
            cell.fuse()
        for norm in self.modules():
            if isinstance(norm, PositionNorm):
                norm.fuse(map_size(size or self.norm_size, norm.stride))
        return self


def require_compiler(user: str, alternative: str = '') -> None:
    """Check that there is a C++ compiler.

    Args:
        user: What needs it, for the message.
        alternative: What else can be done, for the end of the message.

    Raises:
        RuntimeError: If there is none.
    """
    compiler = os.environ.get('CXX', 'g++')
    if not any(shutil.which(name) for name in (compiler, 'clang++')):
        raise RuntimeError(
            f'{user} needs a C++ compiler and there is no {compiler}: '
            f'install one (Debian: apt install g++){alternative}'
        )


def _checked_norm_size(
    norm: str, size: int | Sequence[int] | None, sync: bool
) -> tuple[int, int] | None:
    """Return the height and the width of the images of the norms; None for LN."""
    if norm not in NORMS:
        raise ValueError(f'norm must be one of {NORMS}, got {norm!r}')
    if not isinstance(sync, bool):
        raise ValueError(f'sync_norm must be True or False, got {sync!r}')
    if norm == 'ln':
        if size is not None or sync:
            raise ValueError("norm_size and sync_norm are for norm='bn': LN keeps no statistics")
        return None
    size = NORM_SIZE if size is None else size
    sides = (size, size) if type(size) is int else size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(type(side) is int and side > 0 for side in sides)
    ):
        raise ValueError(f'norm_size must be a positive integer or two (H, W), got {size!r}')
    return tuple(sides)


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
        self.fc = nn.Linear(2 * channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of a feature (B, C, H, W)."""
        return self.fc(self.dropout(self.products(feature).mean((1, 2))))

    def products(self, feature: Tensor) -> Tensor:
        """Return ``l + l * r`` of a feature (B, C, H, W), (B, H, W, 2C)."""
        left, right = self.proj(self.norm(feature.permute(0, 2, 3, 1))).chunk(2, -1)
        return left + left * right


class PolyNeXtClassifier(PolyNeXt):
    """PolyNeXt with the released ImageNet classifier, to check the published accuracy.

    Args:
        arch: As of :class:`PolyNeXt`.
        num_classes: Of the logits.
        in_channels: As of :class:`PolyNeXt`.
        drop_path_rate: As of :class:`PolyNeXt`.
        norm: As of :class:`PolyNeXt`.
        norm_size: As of :class:`PolyNeXt`.
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
        self.head = Classifier(self.arch.widths[-1], num_classes, norm=self._norm_maker(last))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, in_channels, H, W)."""
        *_, last = self.forward_stages(x)
        return self.head(last)
