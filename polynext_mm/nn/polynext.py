"""PolyNeXt: cells, stages and the network, in torch alone.

Source: "Activation-Free Backbones for Image Recognition: Polynomial Alternatives within
MetaFormer-Style Vision Models" (ICML 2026, arXiv 2605.20839) and its authors' release.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .layers import HEAD_WIDTH, DepthwiseConv, LayerNorm, PolyAttn, PolyConv, PolyMLP

STEM_STRIDE = 4
MIXERS = ('conv', 'attn')
DOWNSAMPLINGS = ('sep3x3', 'full3x3')


@dataclasses.dataclass(frozen=True)
class Arch:
    """What makes one PolyNeXt differ from another. One entry a stage, unless said otherwise.

    Args:
        widths (tuple[int]): Channels.
        depths (tuple[int]): Cells.
        stacks (tuple[int]): Stacks (a mixer and a PolyMLP) in every cell.
        mixers (tuple[str]): 'conv' (PolyConv) or 'attn' (PolyAttn).
        conv_ratios (tuple[float]): Inner width of PolyConv over the stage's.
        mlp_ratios (tuple[float]): Width of PolyMLP's two projections together over the stage's.
        downsampling (tuple[str]): How s0 and how s1 shrink between stages (two entries): 'sep3x3',
            a depthwise 3x3 convolution and a 1x1, or 'full3x3', a dense one.
        gate_init (tuple[float]): lam of every cell from scratch: one logit a gate.
        paired_gates (bool): Stack i uses the gates (i, i + 1) instead of (2i, 2i + 1).

    Raises:
        ValueError: For values that make no network, naming the field.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stacks: tuple[int, ...]
    mixers: tuple[str, ...]
    conv_ratios: tuple[float, ...]
    mlp_ratios: tuple[float, ...]
    downsampling: tuple[str, str]
    gate_init: tuple[float, ...]
    paired_gates: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif field.name != 'paired_gates' and not isinstance(value, tuple):
                raise ValueError(f'arch: {field.name} must be a sequence, got {value!r}')
        for name in ('depths', 'stacks', 'mixers', 'conv_ratios', 'mlp_ratios'):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(
                    f'arch: {name} needs one entry for each of the {len(self.widths)} '
                    f'widths, got {getattr(self, name)!r}'
                )
        for name in ('widths', 'depths', 'stacks'):
            if not self.widths or any(type(n) is not int or n < 1 for n in getattr(self, name)):
                raise ValueError(
                    f'arch: {name} must be positive integers, got {getattr(self, name)!r}'
                )
        for name in ('conv_ratios', 'mlp_ratios', 'gate_init'):
            if not all(map(_is_number, getattr(self, name))):
                raise ValueError(f'arch: {name} must be numbers, got {getattr(self, name)!r}')
        if not set(self.mixers) <= set(MIXERS):
            raise ValueError(f'arch: mixers must be of {MIXERS}, got {self.mixers!r}')
        if len(self.downsampling) != 2 or not set(self.downsampling) <= set(DOWNSAMPLINGS):
            raise ValueError(
                f'arch: downsampling must be two of {DOWNSAMPLINGS} (for s0 and s1), '
                f'got {self.downsampling!r}'
            )
        if not isinstance(self.paired_gates, bool):
            raise ValueError(f'arch: paired_gates must be a bool, got {self.paired_gates!r}')
        for width, ratio in zip(self.widths, self.conv_ratios):
            if int(width * ratio) < 1:
                raise ValueError(f'arch: conv_ratios {ratio} leaves no channel of width {width}')
        for width, ratio in zip(self.widths, self.mlp_ratios):
            if int(width * ratio) < 2 or int(width * ratio) % 2:
                raise ValueError(
                    'arch: int(width * mlp_ratio) must be even and positive, got '
                    f'{int(width * ratio)} for width {width} and ratio {ratio}'
                )
        needed = max(max(self.gates(i)) for i in range(max(self.stacks))) + 1
        if len(self.gate_init) < needed:
            raise ValueError(
                f'arch: gate_init needs at least {needed} entries for '
                f'{max(self.stacks)} stacks, got {len(self.gate_init)}'
            )

    def gates(self, stack: int) -> tuple[int, int]:
        """Indices into lam of a stack's mixer and PolyMLP."""
        return (stack, stack + 1) if self.paired_gates else (2 * stack, 2 * stack + 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Output stride of every stage."""
        return tuple(STEM_STRIDE * 2**i for i in range(len(self.widths)))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _archs() -> dict[str, Arch]:
    tiny_gates = tuple(math.log(g / (1 - g)) for g in (0.5, 0.5, 0.25, 0.125, 0.0625, 0.03125))
    halves = tuple(-0.5 * i for i in range(9))
    mixed = ('sep3x3', 'full3x3')
    #          C  cells           stacks        (s0, s1)              lam          paired
    sizes = {
        't': (48, (2, 2, 6, 2), (3, 3, 3, 3), ('sep3x3', 'sep3x3'), tiny_gates, True),
        's': (72, (3, 3, 8, 3), (3, 4, 4, 4), mixed, halves[:8], False),
        'b': (84, (3, 5, 10, 3), (4, 4, 4, 4), mixed, halves[:8], False),
        'l': (96, (3, 6, 12, 3), (4, 4, 4, 4), mixed, halves[1:], False),
    }
    families = {'cpolynext': ('conv',) * 4, 'apolynext': ('conv', 'conv', 'attn', 'attn')}
    return {
        f'{family}_{size}': Arch(
            tuple(width * m for m in (1, 2, 4, 6)),
            depths,
            stacks,
            mixers,
            (1, 1, 0.75, 0.75),
            (2, 2, 1.75, 1.75),
            downsampling,
            gate_init,
            paired,
        )
        for family, mixers in families.items()
        for size, (width, depths, stacks, downsampling, gate_init, paired) in sizes.items()
    }


ARCHS: dict[str, Arch] = _archs()


def get_arch(arch: str | Mapping | Arch) -> Arch:
    """The arch of a name of :data:`ARCHS`, of a dict with the fields of :class:`Arch`, or itself.

    Raises:
        ValueError: For an unknown name or field, with the valid ones, and for anything else.
    """
    if isinstance(arch, Arch):
        return arch
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}: choose one of {", ".join(ARCHS)}')
        return ARCHS[arch]
    if isinstance(arch, Mapping):
        fields = {field.name: field for field in dataclasses.fields(Arch)}
        unknown = sorted(set(arch) - set(fields))
        missing = [
            name
            for name, field in fields.items()
            if name not in arch and field.default is dataclasses.MISSING
        ]
        if unknown or missing:
            raise ValueError(
                f'arch: unknown fields {unknown}, missing fields {missing}; '
                f'the fields are {", ".join(fields)}'
            )
        return Arch(**arch)
    raise ValueError(
        f'arch must be one of {", ".join(ARCHS)}, or a dict of the fields of Arch, got {arch!r}'
    )


class DropPath(nn.Module):
    """Drop a branch for whole samples in training, and scale the others (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """What to multiply a branch on ``x`` by, (B, 1, 1, 1), or None for 1."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return mask / keep if keep > 0 else mask


class Stack(nn.Module):
    """A mixer and a PolyMLP, each behind its gate, on the residual stream."""

    def __init__(self, arch: Arch, stage: int):
        super().__init__()
        width = arch.widths[stage]
        if arch.mixers[stage] == 'attn':
            self.mixer = PolyAttn(width)
        else:
            self.mixer = PolyConv(width, arch.conv_ratios[stage], 3 if stage == 0 else 5)
        self.mlp = PolyMLP(width, arch.mlp_ratios[stage])

    def forward(
        self, x: Tensor, gates: tuple[Tensor | None, ...], keeps: tuple[Tensor | None, ...]
    ) -> Tensor:
        """Of ``gates`` and ``keeps`` the first is the mixer's, the second the PolyMLP's."""
        for branch, gate, keep in zip((self.mixer, self.mlp), gates, keeps):
            x = branch(x, gate, keep)
        return x

    def fuse(self, gates: tuple[Tensor, ...]) -> None:
        self.mixer.fuse(gates[0])
        self.mlp.fuse(gates[1])


class Cell(nn.Module):
    """Map the running pair (s0, s1) to the next feature.

    Args:
        arch (Arch): The network's.
        stage (int): Which of its stages, from 0.
        drop_path (float): Rate of every branch.
    """

    def __init__(self, arch: Arch, stage: int, drop_path: float):
        super().__init__()
        width = arch.widths[stage]
        self.scale0 = nn.Parameter(torch.ones(width))
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm = LayerNorm(width)
        self.gate_logits = nn.Parameter(torch.tensor(arch.gate_init, dtype=torch.float32))
        self.stacks = nn.ModuleList(Stack(arch, stage) for _ in range(arch.stacks[stage]))
        self.drop_path = DropPath(drop_path)
        self._gate_indices = [arch.gates(i) for i in range(arch.stacks[stage])]

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        x = ops.norm_of_pair(s0, s1, self.scale0, self.scale1, self.norm.weight)
        for stack, gates in zip(self.stacks, self._gates()):
            x = stack(x, gates, (self.drop_path(x), self.drop_path(x)))
        return x

    def _gates(self) -> list[tuple[Tensor | None, ...]]:
        """sigmoid(lam) of every stack's branches, or None where it is part of their weights."""
        if self.gate_logits is None:
            return [(None, None)] * len(self.stacks)
        gates = self.gate_logits.sigmoid()
        return [tuple(gates[i] for i in indices) for indices in self._gate_indices]

    @torch.no_grad()
    def fuse(self) -> None:
        if self.gate_logits is None:
            return
        for stack, gates in zip(self.stacks, self._gates()):
            stack.fuse(gates)
        self.gate_logits = None


class Downsample(nn.Module):
    """Halve (B, H, W, C_in) to (B, ceil(H / 2), ceil(W / 2), C_out)."""

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
        arch (Arch): The network's.
        index (int): Which of its stages, from 0.
        drop_paths (list[float]): One rate a cell.
        with_cp (bool): Checkpoint every cell in training: less memory, more time.
        grad_clip_norm (float | None): Largest norm of the gradient at a cell's output.
    """

    def __init__(
        self,
        arch: Arch,
        index: int,
        drop_paths: list[float],
        with_cp: bool,
        grad_clip_norm: float | None,
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
        self.cells = nn.ModuleList(Cell(arch, index, rate) for rate in drop_paths)

    def forward(self, s0: Tensor, s1: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Map the pair to the last two features; ``loss_scale`` concerns the clip alone."""
        if self.downsample is not None:
            s0, s1 = (shrink(s) for shrink, s in zip(self.downsample, (s0, s1)))
        for cell in self.cells:
            if self.with_cp and torch.is_grad_enabled():
                out = checkpoint(cell, s0, s1, use_reentrant=False)
            else:
                out = cell(s0, s1)
            if self.grad_clip_norm is not None and out.requires_grad:
                out = ops.clip_gradient(out, self.grad_clip_norm, loss_scale)
            s0, s1 = s1, out
        return s0, s1


class PolyNeXt(nn.Module):
    """Stem and stages.

    Args:
        arch (str | Mapping | Arch): A name of :data:`ARCHS`, or a custom arch.
        in_channels (int): Of the image. Defaults to 3.
        drop_path_rate (float): Of the last cell; the rates rise linearly from 0 at the first.
        with_cp (bool): Checkpoint every cell in training.
        grad_clip_norm (float | None): Per-cell clip of the gradient in backward, of the A recipe.

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
    ):
        super().__init__()
        if not _is_number(drop_path_rate) or not 0 <= drop_path_rate <= 1:
            raise ValueError(f'drop_path_rate must be within [0, 1], got {drop_path_rate!r}')
        if type(in_channels) is not int or in_channels < 1:
            raise ValueError(f'in_channels must be a positive integer, got {in_channels!r}')
        if grad_clip_norm is not None and not (_is_number(grad_clip_norm) and grad_clip_norm > 0):
            raise ValueError(f'grad_clip_norm must be positive or None, got {grad_clip_norm!r}')
        self.arch = get_arch(arch)
        self.loss_scale: float | None = None
        self.stem = nn.Conv2d(in_channels, self.arch.widths[0], 7, STEM_STRIDE, 3, bias=False)
        last = max(1, sum(self.arch.depths) - 1)
        rates = (drop_path_rate * cell / last for cell in range(last + 1))
        self.stages = nn.ModuleList(
            Stage(self.arch, i, [next(rates) for _ in range(depth)], with_cp, grad_clip_norm)
            for i, depth in enumerate(self.arch.depths)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize for training from scratch as the authors do for dense prediction: convolutions
        truncated normal, std .02; norms, scales and gates at their start."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, DepthwiseConv)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Cell):
                nn.init.ones_(module.scale0)
                nn.init.ones_(module.scale1)
                module.gate_logits.copy_(torch.tensor(self.arch.gate_init))
            elif isinstance(module, PolyAttn):
                module.scale_logit.fill_(-math.log(HEAD_WIDTH**0.5 - 1))  # the logit of 32^-.5

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield every stage's feature of an image (B, in_channels, H, W), from stride 4 to 32, as
        (B, C, ceil(H / stride), ceil(W / stride)) in channels-last memory."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        s0 = x.permute(0, 2, 3, 1).contiguous()
        s1 = s0.view_as(s0)  # the same, as a second tensor: Dynamo allows a Function none twice
        for stage in self.stages:
            s0, s1 = stage(s0, s1, self.loss_scale or 1.0)
            yield s1.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.forward_stages(x))

    def cells(self) -> list[Cell]:
        """All cells, in order."""
        return [cell for stage in self.stages for cell in stage.cells]

    def compile_cells(self) -> 'PolyNeXt':
        """Compile the stacks of every cell, one by one, for any size: equal stacks share their code, and
        names do not change.

        Raises:
            RuntimeError: Without a C++ compiler, which torch.compile needs.
        """
        compiler = os.environ.get('CXX', 'g++')
        if not any(shutil.which(name) for name in (compiler, 'clang++')):
            raise RuntimeError(
                f'torch.compile needs a C++ compiler and there is no {compiler}: '
                'install one (Debian: apt install g++) or turn compilation off'
            )
        # All stacks are one function to Dynamo: its default of 8 versions would not do for four stages,
        # with and without drop path, in training and evaluation, and what exceeds it runs uncompiled.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
        for cell in self.cells():
            for stack in cell.stacks:
                stack.compile(dynamic=True)
        return self

    def fuse(self) -> 'PolyNeXt':
        """Fold gates, attention scales and norm scales into neighbouring weights, in place, for
        deployment. The outputs are the same to rounding; there is no way back and no training."""
        self.eval().requires_grad_(False)
        for cell in self.cells():
            cell.fuse()
        return self


class Classifier(nn.Module):
    """The released ImageNet head: ``Linear(mean of (l + l * r))``, l and r the halves of
    ``pw(LN(feature))`` of width 4C.

    Args:
        channels (int): C, of the last stage.
        num_classes (int): Of the logits.
        dropout (float): Before the last layer.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.norm = LayerNorm(channels)
        self.proj = nn.Linear(channels, 4 * channels, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits (B, num_classes) of a feature (B, C, H, W)."""
        left, right = self.proj(self.norm(feature.permute(0, 2, 3, 1))).chunk(2, -1)
        pooled = (left + left * right).mean((1, 2))
        return self.fc(self.dropout(pooled))


class PolyNeXtClassifier(PolyNeXt):
    """PolyNeXt with the released ImageNet classifier, to check the published accuracy.

    Args:
        arch (str | Mapping | Arch): As of :class:`PolyNeXt`.
        num_classes (int): Defaults to 1000.
        in_channels (int): Defaults to 3.
        drop_path_rate (float): Defaults to 0.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(arch, in_channels, drop_path_rate)
        self.head = Classifier(self.arch.widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W)."""
        *_, last = self.forward_stages(x)
        return self.head(last)
