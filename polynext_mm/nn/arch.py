"""The archs of the PolyNeXt family, as data.

Source: the paper's table of architectures and its authors' release.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

MIXERS = ('conv', 'attn')
DOWNSAMPLINGS = ('sep3x3', 'full3x3')
MIXER_DEGREES = {'conv': 2, 'attn': 9}
MLP_DEGREE = 2
SCALAR_FIELDS = ('paired_gates', 'stem_size', 'stem_stride')


@dataclasses.dataclass(frozen=True)
class Arch:
    """What makes one PolyNeXt differ from another, with one entry per stage unless said otherwise.

    Args:
        widths: Number of channels.
        depths: Number of cells.
        stacks: Number of stacks per cell, each a mixer and a PolyMLP.
        mixers: 'conv' (PolyConv) or 'attn' (PolyAttn).
        conv_ratios: Inner width of PolyConv over the width of the stage.
        mlp_ratios: Combined width of PolyMLP's two projections over the width of the stage.
        coarse_sizes: Kernel size of PolyConv's coarse convolution, odd.
        downsampling: How s0 and s1 are downsampled between stages (two entries): 'sep3x3', a
            depthwise 3x3 convolution and a 1x1, or 'full3x3', a dense 3x3.
        gate_init: Initial lam of every cell, one logit per gate.
        paired_gates: Whether stack i uses the gates (i, i + 1) instead of (2i, 2i + 1).
        stem_size: Kernel size of the stem's convolution, odd.
        stem_stride: Stride of the stem.

    Raises:
        ValueError: For values that define no valid network, naming the field.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stacks: tuple[int, ...]
    mixers: tuple[str, ...]
    conv_ratios: tuple[float, ...]
    mlp_ratios: tuple[float, ...]
    coarse_sizes: tuple[int, ...]
    downsampling: tuple[str, str]
    gate_init: tuple[float, ...]
    paired_gates: bool = False
    stem_size: int = 7
    stem_stride: int = 4

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif field.name not in SCALAR_FIELDS and not isinstance(value, tuple):
                raise ValueError(f'arch: {field.name} must be a sequence, got {value!r}')
        for name in ('depths', 'stacks', 'mixers', 'conv_ratios', 'mlp_ratios', 'coarse_sizes'):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(
                    f'arch: {name} needs one entry for each of the {len(self.widths)} '
                    f'widths, got {getattr(self, name)!r}'
                )
        for name in ('widths', 'depths', 'stacks', 'coarse_sizes'):
            if not self.widths or any(type(n) is not int or n < 1 for n in getattr(self, name)):
                raise ValueError(
                    f'arch: {name} must be positive integers, got {getattr(self, name)!r}'
                )
        for name in ('conv_ratios', 'mlp_ratios', 'gate_init'):
            if not all(map(is_number, getattr(self, name))):
                raise ValueError(f'arch: {name} must be numbers, got {getattr(self, name)!r}')
        if any(size % 2 == 0 for size in self.coarse_sizes):
            raise ValueError(f'arch: coarse_sizes must be odd, got {self.coarse_sizes!r}')
        if not set(self.mixers) <= set(MIXERS):
            raise ValueError(f'arch: mixers must be of {MIXERS}, got {self.mixers!r}')
        if len(self.downsampling) != 2 or not set(self.downsampling) <= set(DOWNSAMPLINGS):
            raise ValueError(
                f'arch: downsampling must be two of {DOWNSAMPLINGS} (for s0 and s1), '
                f'got {self.downsampling!r}'
            )
        if not isinstance(self.paired_gates, bool):
            raise ValueError(f'arch: paired_gates must be a bool, got {self.paired_gates!r}')
        for name in ('stem_size', 'stem_stride'):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or (name == 'stem_size' and value % 2 == 0):
                kind = 'an odd positive' if name == 'stem_size' else 'a positive'
                raise ValueError(f'arch: {name} must be {kind} integer, got {value!r}')
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
        """Return the indices into lam of a stack's mixer and PolyMLP."""
        return (stack, stack + 1) if self.paired_gates else (2 * stack, 2 * stack + 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Output stride of every stage."""
        return tuple(self.stem_stride * 2**i for i in range(len(self.widths)))

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degree in the image of every stage's feature, as polynomials (``norm='bn'``, inference).

        Convolutions, matrices, gates and norms with running statistics keep the degree. The product
        of a PolyConv or a PolyMLP doubles it. A PolyAttn multiplies it by 9: q k^T has degree 2,
        its fourth power 8, and the values add one. A branch is added to its own input, so the
        stream takes the branch's degree; s0 is older than s1, so a cell's sum has that of s1.
        CPolyNeXt-T has 72 doublings, so degree 2^72. The ImageNet classifier doubles once more.
        """
        degrees, degree = [], 1
        for depth, stacks, mixer in zip(self.depths, self.stacks, self.mixers):
            degree *= (MIXER_DEGREES[mixer] * MLP_DEGREE) ** (depth * stacks)
            degrees.append(degree)
        return tuple(degrees)

    @property
    def degree(self) -> int:
        """Degree of the last stage's feature: see :attr:`degrees`."""
        return self.degrees[-1]


def is_number(value: object) -> bool:
    """Return whether ``value`` is an int or a float; a bool is not one here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _archs() -> dict[str, Arch]:
    tiny_gates = tuple(math.log(g / (1 - g)) for g in (0.5, 0.5, 0.25, 0.125, 0.0625, 0.03125))
    halves = tuple(-0.5 * i for i in range(9))
    sep, full = DOWNSAMPLINGS
    sizes = {
        # C, cells, stacks, downsampling of s0 and s1, lam, paired gates
        't': (48, (2, 2, 6, 2), (3, 3, 3, 3), (sep, sep), tiny_gates, True),
        's': (72, (3, 3, 8, 3), (3, 4, 4, 4), (sep, full), halves[:8], False),
        'b': (84, (3, 5, 10, 3), (4, 4, 4, 4), (sep, full), halves[:8], False),
        'l': (96, (3, 6, 12, 3), (4, 4, 4, 4), (sep, full), halves[1:], False),
    }
    families = {
        'cpolynext': ('conv', 'conv', 'conv', 'conv'),
        'apolynext': ('conv', 'conv', 'attn', 'attn'),
    }
    archs = {
        f'{family}_{size}': Arch(
            widths=(width, 2 * width, 4 * width, 6 * width),
            depths=depths,
            stacks=stacks,
            mixers=mixers,
            conv_ratios=(1, 1, 0.75, 0.75),
            mlp_ratios=(2, 2, 1.75, 1.75),
            coarse_sizes=(3, 5, 5, 5),
            downsampling=downsampling,
            gate_init=gate_init,
            paired_gates=paired_gates,
        )
        for family, mixers in families.items()
        for size, (width, depths, stacks, downsampling, gate_init, paired_gates) in sizes.items()
    }
    # for small images; its lam starts at the values that T's has after the sigmoid
    archs['cpolynext_lr'] = Arch(
        widths=(72, 144, 288),
        depths=(2, 3, 3),
        stacks=(3, 3, 3),
        mixers=('conv', 'conv', 'conv'),
        conv_ratios=(1, 1, 1),
        mlp_ratios=(2, 2, 2),
        coarse_sizes=(3, 5, 5),
        downsampling=(sep, sep),
        gate_init=(0.5, 0.5, 0.25, 0.125, 0.0625, 0.03125),
        stem_size=3,
        stem_stride=1,
    )
    return archs


#: The published archs, by name.
ARCHS: dict[str, Arch] = _archs()


def widths(arch: str | Mapping | Arch) -> list[int]:
    """Return the channels of every stage, for ``in_channels`` of necks and heads in a config::

        arch = 'cpolynext_t'
        widths = __import__('polynext_mm').widths(arch)  # [48, 96, 192, 288]

    Args:
        arch: As for :func:`get_arch`.

    Raises:
        ValueError: As :func:`get_arch`.
    """
    return list(get_arch(arch).widths)


def get_arch(arch: str | Mapping | Arch) -> Arch:
    """Return an arch by its name, built from the fields of :class:`Arch`, or unchanged.

    Args:
        arch: A name of :data:`ARCHS`, a dict with the fields of :class:`Arch`, or an Arch.

    Raises:
        ValueError: For an unknown name or field, naming the valid ones, and for anything else.
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
