"""What the backbones of this package share in mm: outputs, output norms, freezing, safe loading."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..compat.logs import say
from ..compat.torch_features import register_load_state_dict_pre_hook
from ..weights import loading
from ..weights.names import BACKBONE

SMALLEST_IMAGE = 32


class OutNorm(nn.LayerNorm):
    """LN over the channels of (B, C, H, W), with weight and bias, float32 or wider."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = super().forward(x if x.dtype is torch.float64 else x.float())
        return x.permute(0, 3, 1, 2)


class MultiScale(BaseModule):
    """A stem and stages, some of whose features are returned.

    A subclass has ``stem`` and ``stages``, defines :meth:`forward_stages` and :meth:`adapt`,
    and calls :meth:`set_outputs` at the end of its constructor.

    Attributes:
        out_indices: Stages to return, from 0.
        out_channels: Channels of the outputs.
        out_strides: Strides of the outputs.
        out_norms: The LN of each output, by the index of its stage; empty without ``out_norm``.
        out_contiguous: The argument.
        adapt_stem: The argument.
        frozen_stages: The argument.
    """

    #: Endings of the names of learned scales, which no recipe decays.
    scales: tuple[str, ...] = ()

    #: Name of the list of cells in a stage.
    cells_name = 'cells'

    def set_outputs(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int,
        out_norm: bool,
        out_contiguous: bool,
        adapt_stem: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        """Check and apply the arguments that all backbones share.

        Args:
            widths: Channels of every stage.
            strides: Stride of every stage.
            out_indices: Stages to return, ascending, from 0.
            frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
            out_norm: Pass every output through an LN of its own.
            out_contiguous: Return outputs in contiguous memory, (B, C, H, W) in this order.
            adapt_stem: Adapt the stem of files for images of three channels.
            init_cfg: As for mmengine's BaseModule.

        Raises:
            ValueError: For values that are not valid, naming those that are.
        """
        check_bools(out_norm=out_norm, out_contiguous=out_contiguous, adapt_stem=adapt_stem)
        num_stages = len(widths)
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
        self.init_cfg = copy.deepcopy(init_cfg)
        self.out_indices = tuple(out_indices)
        self.out_channels = tuple(widths[i] for i in self.out_indices)
        self.out_strides = tuple(strides[i] for i in self.out_indices)
        self.frozen_stages = frozen_stages
        self.out_contiguous = out_contiguous
        self.adapt_stem = adapt_stem
        self.out_norms = nn.ModuleDict()
        if out_norm:
            for index, channels in zip(self.out_indices, self.out_channels):
                self.out_norms[str(index)] = self.make_out_norm(index, channels)
        for module in self._frozen():
            module.requires_grad_(False)
        register_load_state_dict_pre_hook(self, _adapt_state_dict)

    def make_out_norm(self, stage: int, channels: int) -> nn.Module:
        """Return the norm for the output of a stage."""
        return OutNorm(channels)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature (B, C, H / stride, W / stride) of every stage."""
        raise NotImplementedError

    def adapt(
        self, state_dict: dict[str, Tensor], prefix: str, source: str | os.PathLike | None = None
    ) -> str:
        """Convert this backbone's weights in ``state_dict`` to what it loads, after a strict check.

        Args:
            state_dict: Weights, changed in place; keys that begin with ``prefix`` are the
                backbone's. If ``prefix`` is empty, they may be a whole model's, whose heads are
                left over.
            prefix: Where the backbone is in the model: '' or a name and a dot.
            source: The file, for messages.

        Returns:
            The report, "loaded N of M tensors ...".

        Raises:
            CheckpointError: If a shape is wrong, or anything is missing or left over but output
                norms and a classifier.
        """
        raise NotImplementedError

    def get_layer_depth(self, param_name: str, prefix: str = BACKBONE) -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for layer-wise learning rates.

        The stem has depth 0, every cell with the downsampling before it one more than the previous,
        and the output norms come last.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Prefix of the backbone's parameters in the model.
        """
        depths = [len(getattr(stage, self.cells_name)) for stage in self.stages]
        total = sum(depths) + 2
        parts = param_name.removeprefix(prefix).split('.')
        if parts[0] == 'stem':
            return 0, total
        if parts[0] != 'stages':
            return total - 1, total
        stage = int(parts[1])
        cell = int(parts[3]) if parts[2] == self.cells_name else 0
        return 1 + sum(depths[:stage]) + cell, total

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the features of ``out_indices``, in channels-last memory or contiguous.

        Args:
            x: Images, (B, in_channels, H, W), H and W from 32 up.

        Raises:
            ValueError: For smaller images.
        """
        if min(x.shape[-2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f'images must be at least {SMALLEST_IMAGE}x{SMALLEST_IMAGE}, '
                f'got {x.shape[-2]}x{x.shape[-1]}'
            )
        outs = []
        for index, feature in enumerate(self.forward_stages(x)):
            if index in self.out_indices:
                norm = str(index)
                out = self.out_norms[norm](feature) if norm in self.out_norms else feature
                outs.append(out.contiguous() if self.out_contiguous else out)
            if index == self.out_indices[-1]:
                break
        return tuple(outs)

    def train(self, mode: bool = True) -> MultiScale:
        """Set the training mode; frozen stages stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *self.stages[: self.frozen_stages]]


def _adapt_state_dict(
    backbone: MultiScale, state_dict: dict, prefix: str, local_metadata: dict, *_
) -> None:
    report = backbone.adapt(state_dict, prefix, local_metadata.get('source'))
    say(report)


# ------------------------------------------------------------------------------------------------
# Heads beside a backbone: they exist if the backbone is registered as a child of a model
# ------------------------------------------------------------------------------------------------

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _watch_heads(model: nn.Module, name: str, part: nn.Module | None) -> None:
    if isinstance(part, MultiScale) and model not in _models:
        _models.add(model)
        register_load_state_dict_pre_hook(model, _check_heads)


register_module_module_registration_hook(_watch_heads)


def _check_heads(model: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, *_) -> None:
    """Check the weights of the heads when a whole model is loaded from a file."""
    if 'source' not in local_metadata:
        return  # not from a file: these may be only part of the model's weights
    backbones = {k: part for k, part in model.named_children() if isinstance(part, MultiScale)}
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not any(key.partition('.')[0] in backbones for key in own):
        return  # the backbone raises the clearer error later
    options = local_metadata.get(loading.OPTIONS, {})
    kept = own.copy()
    report = loading.check(
        model,
        kept,
        local_metadata['source'],
        backbones=backbones,
        **{'evaluation': True, **options},
    )
    for key in own.keys() - kept.keys():
        del state_dict[prefix + key]
    say(report)


def check_bools(**settings: bool) -> None:
    """Check that every setting is True or False, since the string ``'no'`` would count as true.

    Raises:
        ValueError: If one is not, naming it.
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}')


def refuse_pretrained(pretrained: object, checkpoint: str) -> None:
    """Check that ``pretrained``, which mmseg's segmentors pass on to their backbone, is None.

    Args:
        pretrained: As given to the backbone.
        checkpoint: What its ``init_cfg`` could name instead.

    Raises:
        ValueError: If it is not None, saying where weights are set.
    """
    if pretrained is not None:
        raise ValueError(
            f'pretrained={pretrained!r}: the weights of a backbone are set by init_cfg. Write '
            "pretrained=None in the model, and in its backbone init_cfg=dict(type='Pretrained', "
            f"checkpoint='{checkpoint}'), or no init_cfg to train from scratch"
        )
