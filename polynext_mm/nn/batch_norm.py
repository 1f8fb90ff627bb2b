"""The norms of fully polynomial networks (``norm='bn'``), which are constants in inference.

Source: the paper and its authors' release. Each norm has weights and running statistics for every
position of a map, so they belong to one image size. Here they also work for any other size: they
are resized bilinearly to the map in use, and row sums are also scaled by the ratio of token counts.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch_features import is_compiling
from . import ops
from .arch import Arch
from .ops import dispatch
from .ops.channel_batch_norm import mean_over_processes
from .ops.precision import LN_EPS, wide

MOMENTUM = 0.1
ROW_SUM_EPS = 1e-6
CACHED_SIZES = 8
NORMS = ('ln', 'bn')
NORM_SIZE = 224  # of the released fully polynomial networks


def map_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the height and the width of an image's map at a stride."""
    height, width = image_size
    return math.ceil(height / stride), math.ceil(width / stride)


class PositionNorm(nn.Module):
    """Base of the norms of a fully polynomial network: tables with a value for every position.

    In training on maps of another size, the tables are resized to the map, and the map's statistics
    are resized to the tables.

    Args:
        stride: Stride of the maps.
        over_processes: Whether to take statistics over the batches of all processes in training.
    """

    #: Names of the tables, (..., H, W) each.
    tables: ClassVar[tuple[str, ...]] = ()
    num_batches_tracked: Tensor

    def __init__(self, stride: int, over_processes: bool):
        super().__init__()
        self.stride = stride
        self.over_processes = over_processes
        self.register_buffer('num_batches_tracked', torch.tensor(0))
        self._constants_by_size: dict[tuple[int, int], tuple] = {}
        self._fused_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The height and the width of the tables."""
        height, width = getattr(self, self.tables[0]).shape[-2:]
        return height, width

    def reset_parameters(self) -> None:
        """Initialize for training from scratch."""
        raise NotImplementedError

    @torch.no_grad()
    def resize_(self, size: tuple[int, int]) -> None:
        """Resize the tables permanently; parameters stay the same objects."""
        if self.size == size:
            return
        tables = {name: self._at(name, size) for name in self.tables}
        for name, table in tables.items():
            old = getattr(self, name)
            table = table.to(old.dtype)
            if isinstance(old, nn.Parameter):
                old.data, old.grad = table, None
            else:
                setattr(self, name, table)
        self._constants_by_size.clear()

    def _at(self, name: str, size: tuple[int, int]) -> Tensor:
        """Return a table resized to a map, never in half precision."""
        return _resized(wide(getattr(self, name)), size)

    def _constants(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return the constants of inference for a map size, cached between calls."""
        if size == self._fused_size:
            return self._fused()
        sources = [getattr(self, name) for name in self.tables]
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if differentiable or is_compiling() or dispatch.exporting():
            return self._computed_constants(size)
        stamp = tuple((source.data_ptr(), source._version) for source in sources)
        known_stamp, constants = self._constants_by_size.pop(size, (None, None))
        if known_stamp != stamp:
            # outside inference mode, whose tensors cannot be used in autograd later
            with torch.inference_mode(False), torch.no_grad():
                constants = self._computed_constants(size)
        self._constants_by_size[size] = (stamp, constants)  # most recently used last
        if len(self._constants_by_size) > CACHED_SIZES:
            del self._constants_by_size[next(iter(self._constants_by_size))]
        return constants

    def _computed_constants(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _fused(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self._fused_names())

    def _fused_names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith('fused_')]

    @torch.no_grad()
    def fuse(self, size: tuple[int, int]) -> None:
        """Keep the constants of one map size as buffers, so that an export holds only those."""
        for name in self._fused_names():
            delattr(self, name)
        self._constants_by_size.clear()
        self._fused_size = None
        for i, constant in enumerate(self._computed_constants(size)):
            self.register_buffer(f'fused_{i}', constant)
        self._fused_size = size

    @torch.no_grad()
    def _track(self, **statistics: Tensor) -> None:
        """Update running statistics with a batch's, once even if checkpointing recomputes it."""
        if dispatch.recomputing():
            return
        for name, value in statistics.items():
            running = getattr(self, name)
            running.lerp_(value.to(running.dtype), MOMENTUM)
        self.num_batches_tracked.add_(1)

    def _apply(self, fn, recurse=True):
        self._constants_by_size.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._constants_by_size.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelBatchNorm(PositionNorm):
    """Norm of (B, H, W, C) over batch and channels at every position, in float32 or wider::

        y = (x - mean_p) / sqrt(var_p + 1e-5) * position_weight_p * weight

    Args:
        channels: C.
        size: (H, W) of the maps that the statistics are for.
        stride: Of these maps.
        over_processes: As for :class:`PositionNorm`.
    """

    tables = ('position_weight', 'running_mean', 'running_var')
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int, size: tuple[int, int], stride: int, over_processes: bool = False
    ):
        super().__init__(stride, over_processes)
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(channels))
        self.position_weight = nn.Parameter(torch.ones(size))
        self.register_buffer('running_mean', torch.zeros(size))
        self.register_buffer('running_var', torch.ones(size))
        self._input_has_weight = False

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.ones_(self.position_weight)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, H, W, C) to a new map in its dtype."""
        if self.training:
            return self._normalized_by_batch(x).to(x.dtype)
        scale, shift = self._constants((x.shape[1], x.shape[2]))
        y = wide(x) * scale + shift
        y = y if self.weight is None or self._input_has_weight else y * self.weight
        return y.to(x.dtype)

    def _normalized_by_batch(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        w_position = self._at('position_weight', size)
        over_processes = self.over_processes and many_processes()
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        y, mean, var = ops.channel_batch_norm(x, w_position, wide(weight), over_processes)
        own = self.size
        self._track(running_mean=_resized(mean, own), running_var=_resized(var, own))
        return y

    def _computed_constants(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the factor, (H, W, 1), and the offset, (H, W, 1) or (H, W, C)."""
        w_position, mean, var = (self._at(name, size)[..., None] for name in self.tables)
        scale = w_position * (var + LN_EPS).rsqrt()
        shift = -mean * scale
        if self._input_has_weight and self.weight is not None:
            shift = shift * wide(self.weight)
        return scale, shift

    @torch.no_grad()
    def fold_forward(self, following: nn.Linear) -> None:
        """Move the weight into the columns of the matrix that follows."""
        if self.weight is not None:
            following.weight.mul_(self.weight)
        self.weight = None

    @torch.no_grad()
    def fold_back(self, *rows: Tensor) -> None:
        """Move the weight into what produces the input: matrices (C, ...) or scales (C,)."""
        if self.weight is not None:
            for weight in rows:
                weight.mul_(self.weight.view(-1, *[1] * (weight.ndim - 1)))
        self._input_has_weight = True


class RowSumNorm(PositionNorm):
    """Divide attention by its average row sum over batches instead of its own::

        out_i = sum_j a_ij v_j / (average_i + 1e-6) * weight_i

    Args:
        heads: Number of attention heads.
        size: (H, W) of the maps that the statistics are for.
        stride: Of these maps.
        over_processes: As for :class:`PositionNorm`.
    """

    tables = ('weight', 'running_sum')
    running_sum: Tensor

    def __init__(
        self, heads: int, size: tuple[int, int], stride: int, over_processes: bool = False
    ):
        super().__init__(stride, over_processes)
        self.weight = nn.Parameter(torch.ones(heads, *size))
        self.register_buffer('running_sum', torch.ones(heads, *size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        self.running_sum.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend with the weights ``(1 + q k^T)^4``.

        Args:
            q: Queries, already multiplied by the scale, (B, heads, tokens, head width).
            k: Keys, of the same shape.
            v: Values, of the same shape.
            size: (H, W) of the map that the tokens come from.

        Returns:
            (B, heads, tokens, head width) in the dtype of ``v``.
        """
        y, row_sums = ops.poly_attention_sums(q, k, v)
        factor = self._by_batch(row_sums, size) if self.training else self._constants(size)[0]
        return (y * factor).to(v.dtype)

    def _by_batch(self, row_sums: Tensor, size: tuple[int, int]) -> Tensor:
        if self.over_processes and many_processes():
            average = mean_over_processes(row_sums)
        else:
            average = row_sums.mean(0)
        average = average.unflatten(-1, size)
        self._track(running_sum=_rescaled(average.detach(), self.size))
        return self._factor(self._at('weight', size), average)

    def _computed_constants(self, size: tuple[int, int]) -> tuple[Tensor]:
        return (self._factor(self._at('weight', size), self._at('running_sum', size)),)

    def _at(self, name: str, size: tuple[int, int]) -> Tensor:
        resize = _rescaled if name == 'running_sum' else _resized
        return resize(wide(getattr(self, name)), size)

    def _factor(self, weight: Tensor, average: Tensor) -> Tensor:
        """Return the factor of the sums of values, (heads, tokens, 1)."""
        return (weight / (average + ROW_SUM_EPS)).flatten(1)[..., None]


@dataclasses.dataclass(frozen=True)
class BatchNorms:
    """Make the norms of a stage.

    Args:
        image_size: Height and width of the images that the statistics are for.
        stride: Of the stage's maps.
        over_processes: As for :class:`PositionNorm`.
    """

    image_size: tuple[int, int]
    stride: int
    over_processes: bool = False

    def __call__(self, channels: int) -> ChannelBatchNorm:
        return ChannelBatchNorm(channels, *self.settings)

    def of_rows(self, heads: int) -> RowSumNorm:
        return RowSumNorm(heads, *self.settings)

    @property
    def settings(self) -> tuple:
        """Arguments of the norms after the number of channels or heads."""
        return map_size(self.image_size, self.stride), self.stride, self.over_processes


class NormSizes(nn.Module):
    """A network's methods for the image size that its ``norm='bn'`` norms belong to.

    Attributes:
        norm: 'ln' or 'bn'.
        given_norm_size: Height and width of the images that norms are made for, which training in
            several processes keeps; None for 'ln'.
    """

    arch: Arch

    def set_norm(self, norm: str, norm_size: int | Sequence[int] | None, sync_norm: bool) -> None:
        """Choose the norms to make; see :class:`polynext_mm.nn.PolyNeXt`.

        Raises:
            ValueError: For an invalid value, or a size with ``norm='ln'``.
        """
        self.norm = norm
        self.given_norm_size = checked_norm_size(norm, norm_size, sync_norm)
        self._sync_norm = sync_norm
        self._norm_size_is_settled = False

    def batch_norms(self, stage: int) -> BatchNorms:
        """Return the maker of a stage's norms in a fully polynomial network."""
        size = self.given_norm_size or (NORM_SIZE, NORM_SIZE)
        return BatchNorms(size, self.arch.strides[stage], self._sync_norm)

    @property
    def norm_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the norms' statistics are for; None for 'ln'."""
        if self.given_norm_size is None:
            return None
        norm = next(norm for norm in self.modules() if isinstance(norm, PositionNorm))
        if norm.size == map_size(self.given_norm_size, norm.stride):
            return self.given_norm_size
        height, width = norm.size
        return height * norm.stride, width * norm.stride

    def position_shapes(self, image_size: tuple[int, int]) -> dict[str, torch.Size]:
        """Return the shapes of a state dict's per-position entries at an image size."""
        return {
            f'{name}.{table}': torch.Size(
                (*getattr(norm, table).shape[:-2], *map_size(image_size, norm.stride))
            )
            for name, norm in self.named_modules()
            if isinstance(norm, PositionNorm)
            for table in norm.tables
        }

    def set_norm_size(self, size: int | Sequence[int]) -> None:
        """Resize the norms' weights and statistics permanently.

        Parameters stay the same objects, so an optimizer without state can continue.

        Args:
            size: The side, or height and width, of the new images.

        Raises:
            ValueError: With ``norm='ln'``, or for an invalid size.
        """
        image_size = checked_norm_size(self.norm, size, False)
        for norm in self.modules():
            if isinstance(norm, PositionNorm) and image_size is not None:
                norm.resize_(map_size(image_size, norm.stride))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)  # hooks may rename its entries
        table = state_dict.get(f'{prefix}stages.0.cells.0.norm.position_weight')
        if self.norm == 'bn' and table is not None and table.ndim == 2:
            self.set_norm_size(tuple(side * self.arch.stem_stride for side in table.shape))

    def keep_norm_size(self) -> None:
        """Keep the size of the norms in training, as resuming requires."""
        self._norm_size_is_settled = True

    def settle_norm_size(self, images: Tensor) -> None:
        """Give the norms the size of the first batch of a training, once.

        With several processes, the given size is kept, since DistributedDataParallel recorded the
        shapes of parameters when it wrapped them.
        """
        if not self.training or self._norm_size_is_settled or is_compiling():
            return
        before, given = self.norm_size, self.given_norm_size
        if before is None or given is None:
            return
        image_size = (images.shape[-2], images.shape[-1])
        self._norm_size_is_settled = True
        fixed = many_processes()
        size = given if fixed else image_size
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


def checked_norm_size(
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
    sides = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(type(side) is int and side > 0 for side in sides)
    ):
        raise ValueError(f'norm_size must be a positive integer or two (H, W), got {size!r}')
    height, width = sides
    return height, width


def many_processes() -> bool:
    """Return whether several processes train together."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., H, W) bilinearly, as images are (``align_corners=False``)."""
    if tuple(table.shape[-2:]) == tuple(size):
        return table
    channels = table.reshape(1, -1, *table.shape[-2:])
    resized = F.interpolate(channels, size, mode='bilinear', align_corners=False)
    return resized.reshape(*table.shape[:-2], *size)


def _rescaled(row_sums: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize row sums (heads, H, W), scaled with the number of tokens."""
    height, width = row_sums.shape[-2:]
    if (height, width) == tuple(size):
        return row_sums
    return _resized(row_sums, size) * (size[0] * size[1] / (height * width))
