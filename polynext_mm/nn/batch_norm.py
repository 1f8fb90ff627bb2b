"""The norms of fully polynomial networks (``norm='bn'``): in inference, numbers known beforehand.

Source: the paper and its authors' release. Each norm has weights and running statistics for every
position of a map, so they belong to one size of image. Here they serve any other size: they are
resized bilinearly to the map in use, row sums also by the ratio of the numbers of tokens.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch_features import is_compiling
from . import ops
from .ops import dispatch
from .ops.channel_batch_norm import mean_over_processes
from .ops.precision import LN_EPS, wide

MOMENTUM = 0.1
ROW_SUM_EPS = 1e-6
CACHED_SIZES = 8


def map_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the height and the width of the map of an image at a stride."""
    return tuple(math.ceil(side / stride) for side in image_size)


class PositionNorm(nn.Module):
    """What the norms of a fully polynomial network share: tables with a value for every position.

    In training, statistics of a map of another size are resized to the tables, as the tables are to
    the map.

    Args:
        stride: Of the maps.
        over_processes: Take statistics over the batches of all processes in training.
    """

    #: Names of the tables, (..., H, W) each.
    tables: tuple[str, ...] = ()

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
        return tuple(getattr(self, self.tables[0]).shape[-2:])

    @torch.no_grad()
    def resize_(self, size: tuple[int, int]) -> None:
        """Resize the tables for good; parameters stay the same objects."""
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
        """Return a table resized to a map, never half."""
        return _resized(wide(getattr(self, name)), size)

    def _constants(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return what inference needs at a size of map, once computed for all calls."""
        if size == self._fused_size:
            return self._fused()
        sources = [self._parameters.get(name, self._buffers.get(name)) for name in self.tables]
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if differentiable or is_compiling() or dispatch.exporting():
            return self._computed_constants(size)
        stamp = tuple((source.data_ptr(), source._version) for source in sources)
        known_stamp, constants = self._constants_by_size.pop(size, (None, None))
        if known_stamp != stamp:
            # in no mode that would keep what follows from taking part in a graph of autograd
            with torch.inference_mode(False), torch.no_grad():
                constants = self._computed_constants(size)
        self._constants_by_size[size] = (stamp, constants)  # the last used comes last
        if len(self._constants_by_size) > CACHED_SIZES:
            del self._constants_by_size[next(iter(self._constants_by_size))]
        return constants

    def _computed_constants(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _fused(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in self._fused_names())

    def _fused_names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith('fused_')]

    @torch.no_grad()
    def fuse(self, size: tuple[int, int]) -> None:
        """Keep the constants of one size of map as buffers, so that an export holds them alone."""
        for name in self._fused_names():
            delattr(self, name)
        self._constants_by_size.clear()
        self._fused_size = None
        for i, constant in enumerate(self._computed_constants(size)):
            self.register_buffer(f'fused_{i}', constant)
        self._fused_size = size

    @torch.no_grad()
    def _track(self, **statistics: Tensor) -> None:
        """Move running statistics toward a batch's, once for a map that is computed twice."""
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
        over_processes: As of :class:`PositionNorm`.
    """

    tables = ('position_weight', 'running_mean', 'running_var')

    def __init__(
        self, channels: int, size: tuple[int, int], stride: int, over_processes: bool = False
    ):
        super().__init__(stride, over_processes)
        self.weight = nn.Parameter(torch.ones(channels))
        self.position_weight = nn.Parameter(torch.ones(size))
        self.register_buffer('running_mean', torch.zeros(size))
        self.register_buffer('running_var', torch.ones(size))
        self._input_has_weight = False

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.ones_(self.position_weight)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalize, and multiply by the gate.

        Args:
            x: (B, H, W, C).
            gate: A scalar, or None for 1.

        Returns:
            A new map (B, H, W, C) in the dtype of ``x``.
        """
        weight = self.weight if gate is None else self.weight * gate
        if self.training:
            return self._normalized_by_batch(x, weight).to(x.dtype)
        scale, shift = self._constants(tuple(x.shape[1:3]))
        y = wide(x) * scale + shift
        y = y if weight is None or self._input_has_weight else y * weight
        return y.to(x.dtype)

    def _normalized_by_batch(self, x: Tensor, weight: Tensor) -> Tensor:
        size = tuple(x.shape[1:3])
        w_position = self._at('position_weight', size)
        over_processes = self.over_processes and many_processes()
        y, mean, var = ops.channel_batch_norm(x, w_position, wide(weight), over_processes)
        own = self.size
        self._track(running_mean=_resized(mean, own), running_var=_resized(var, own))
        return y

    def _computed_constants(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the factor, (H, W, 1), and the summand, (H, W, 1) or (H, W, C)."""
        w_position, mean, var = (self._at(name, size)[..., None] for name in self.tables)
        scale = w_position * (var + LN_EPS).rsqrt()
        shift = -mean * scale
        return scale, shift * wide(self.weight) if self._input_has_weight else shift

    @torch.no_grad()
    def fold_forward(self, following: nn.Linear) -> None:
        """Move the weight into the columns of the matrix that follows."""
        following.weight.mul_(self.weight)
        self.weight = None

    @torch.no_grad()
    def fold_back(self, *rows: Tensor) -> None:
        """Move the weight into what the input is made by: matrices (C, ...) or scales (C,)."""
        for weight in rows:
            weight.mul_(self.weight.view(-1, *[1] * (weight.ndim - 1)))
        self._input_has_weight = True


class RowSumNorm(PositionNorm):
    """Divide attention by its average row sum over batches instead of its own::

        out_i = sum_j a_ij v_j / (average_i + 1e-6) * weight_i

    Args:
        heads: Of the attention.
        size: (H, W) of the maps that the statistics are for.
        stride: Of these maps.
        over_processes: As of :class:`PositionNorm`.
    """

    tables = ('weight', 'running_sum')

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
            k: Keys, the same.
            v: Values, the same.
            size: (H, W) of the map whose positions the tokens are.

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
        """Return what the sums of values are multiplied by, (heads, tokens, 1)."""
        return (weight / (average + ROW_SUM_EPS)).flatten(1)[..., None]


@dataclasses.dataclass(frozen=True)
class BatchNorms:
    """Make the norms of a stage.

    Args:
        image_size: Height and width of the images that the statistics are for.
        stride: Of the stage's maps.
        over_processes: As of :class:`PositionNorm`.
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


def many_processes() -> bool:
    """Return whether this is one of several processes that train together."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., H, W) bilinearly, as images are: the corners of the outer pixels stay."""
    if tuple(table.shape[-2:]) == tuple(size):
        return table
    channels = table.reshape(1, -1, *table.shape[-2:])
    resized = F.interpolate(channels, size, mode='bilinear', align_corners=False)
    return resized.reshape(*table.shape[:-2], *size)


def _rescaled(row_sums: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (heads, H, W), the sums growing with the number of tokens."""
    height, width = row_sums.shape[-2:]
    if (height, width) == tuple(size):
        return row_sums
    return _resized(row_sums, size) * (size[0] * size[1] / (height * width))
