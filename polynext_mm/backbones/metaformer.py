"""ConvFormer and CAFormer, the peers of PolyNeXt in comparisons, as mm backbones.

timm has the networks (``timm/models/metaformer.py``); this module gives them the arguments, the
outputs and the strict loading of :class:`~polynext_mm.backbones.PolyNeXt`.
Source: "MetaFormer Baselines for Vision" (TPAMI 2024, arXiv 2210.13452).
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import torch
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor

from ..compat.optional import require_timm
from ..nn.arch import is_number
from ..weights import loading, tensor_checks, timm_hub
from ..weights.names import renamed
from .multiscale import MultiScale, check_bools, refuse_pretrained

METAFORMERS = tuple(
    f'{family}_{size}' for family in ('convformer', 'caformer') for size in ('s18', 's36', 'm36')
)
# keys by which timm's files and those of the authors' release are recognized
_TIMM_MARK = 'stem.conv.weight'
_AUTHORS_MARK = 'downsample_layers.0.conv.weight'
_CLASSIFIER = ('head.', 'norm.')


@MODELS.register_module()
class MetaFormer(MultiScale):
    """ConvFormer or CAFormer backbone with multi-scale outputs, over timm.

    The arguments mean what they mean for :class:`~polynext_mm.backbones.PolyNeXt`. Names of weights
    are timm's.

    Args:
        arch: 'convformer_s18', '_s36', '_m36', or 'caformer_s18', '_s36', '_m36'.
        in_channels: Of the image.
        out_indices: Stages to return, from 0.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with the
            downsampling before each of them. Output norms are never frozen.
        out_norm: Pass every output through an LN of its own.
        out_contiguous: Return outputs in contiguous memory instead of channels-last: one
            copy each, for heads that ``.view`` across channels.
        adapt_stem: Adapt the stem of files for three channels to ``in_channels``, as
            timm does: their kernels are summed for one channel, and repeated and scaled by
            3 / ``in_channels`` for others.
        with_cp: Checkpoint every block in training: less memory, more time.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` takes 'timm://NAME', NAME being a name
            of timm's such as 'convformer_s18.sail_in1k' (or its arch alone, for timm's default), or
            the path or url of a file in timm's names or the names of the authors' release.
        pretrained: Must be None. mmseg's segmentors pass it on to their backbone.

    Raises:
        ImportError: Without timm.
        ValueError: For values that are not valid, naming those that are.

    Attributes:
        out_channels: Channels of the outputs.
        out_strides: Strides of the outputs. The first of the sizes is floor((H + 1) / 4), since the
            stem pads by 2; every other is half of the one before, rounded up.
    """

    scales = (
        *(f'res_scale{i}.scale' for i in (1, 2)),
        *(f'{act}.{kind}' for act in ('act', 'act1') for kind in ('scale', 'bias')),
    )
    cells_name = 'blocks'

    def __init__(
        self,
        arch: str = 'convformer_s18',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        out_norm: bool = True,
        out_contiguous: bool = False,
        adapt_stem: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        pretrained: None = None,
    ):
        refuse_pretrained(pretrained, f'timm://{arch}')
        check_bools(with_cp=with_cp)
        if arch not in METAFORMERS:
            raise ValueError(f'unknown arch {arch!r}: choose one of {", ".join(METAFORMERS)}')
        if type(in_channels) is not int or in_channels < 1:
            raise ValueError(f'in_channels must be a positive integer, got {in_channels!r}')
        if not is_number(drop_path_rate) or not 0 <= drop_path_rate <= 1:
            raise ValueError(f'drop_path_rate must be within [0, 1], got {drop_path_rate!r}')
        super().__init__()
        self.arch = arch
        network = require_timm().create_model(
            arch, in_chans=in_channels, num_classes=0, drop_path_rate=drop_path_rate
        )
        self.stem = network.stem
        self.stages = network.stages
        for stage in self.stages:
            stage.set_grad_checkpointing(with_cp)
        features = network.feature_info
        self.set_outputs(
            [feature['num_chs'] for feature in features],
            [feature['reduction'] for feature in features],
            out_indices,
            frozen_stages,
            out_norm,
            out_contiguous,
            adapt_stem,
            init_cfg,
        )

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature of every stage, (B, C, H, W) in channels-last memory."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
            yield x

    def adapt(
        self, state_dict: dict[str, Tensor], prefix: str, source: str | os.PathLike | None = None
    ) -> str:
        weights, left_over = loading.own_weights(state_dict, prefix, source)
        classifier = [key for key in weights if key.startswith(_CLASSIFIER)]
        for key in classifier:
            del weights[key]
        if _AUTHORS_MARK in weights:
            with loading.naming(source):
                weights = _in_timms_names(weights, self)
        expected = self.state_dict()
        adapted = loading.adapt_stem(weights, expected, _TIMM_MARK) if self.adapt_stem else ''
        unused_norms = [k for k in weights if k.startswith('out_norms.') and k not in expected]
        for key in unused_norms:
            del weights[key]
        missing = [key for key in expected if key not in weights]
        fresh = [key for key in missing if key.startswith('out_norms.')]

        loading.raise_unless_equal(
            expected,
            weights,
            [key for key in missing if key not in fresh],
            source,
            lambda: _hint(weights, self),
        )
        tensor_checks.require_whole_norms(fresh, weights, source)
        tensor_checks.require_loadable(expected, weights, source)
        state_dict.update({prefix + key: value for key, value in weights.items()})
        left_over += [*classifier, *unused_norms]
        report = loading.report('MetaFormer', len(weights), len(expected), source, fresh, left_over)
        return report + adapted


@CheckpointLoader.register_scheme(timm_hub.SCHEME, force=True)
def _load_from_timm(filename: str, map_location: str | None = None) -> dict:
    return timm_hub.read_timm(filename)


def _in_timms_names(weights: dict[str, Tensor], backbone: MetaFormer) -> dict[str, Tensor]:
    """Translate names and shapes of the authors' release with timm's own table.

    Raises:
        ValueError: If two names become one.
    """
    from timm.models.metaformer import checkpoint_filter_fn

    # timm looks up every name in the model; unknown ones are left to the strict check
    known = collections.defaultdict(lambda: torch.empty(0), backbone.state_dict())
    model = SimpleNamespace(state_dict=lambda: known)
    translated = checkpoint_filter_fn(weights, model)
    if len(translated) < len(weights):
        renamed(weights, lambda key: next(iter(checkpoint_filter_fn({key: weights[key]}, model))))
    return translated


def _hint(weights: Mapping[str, Tensor], backbone: MetaFormer) -> str:
    """Say what the file is, if it can be recognized."""
    if _TIMM_MARK not in weights:
        return (
            'it has no weights of the backbone at all (a file that holds a backbone alone is given '
            'as init_cfg of the backbone)'
        )
    family = 'caformer' if any('.qkv.' in key for key in weights) else 'convformer'
    width = 'm' if weights[_TIMM_MARK].shape[0] == 96 else 's'
    third_stage = {key.split('.')[3] for key in weights if key.startswith('stages.2.blocks.')}
    arch = f'{family}_{width}{2 * len(third_stage)}'  # half of all blocks are in the third stage
    if arch in METAFORMERS and arch != backbone.arch:
        return f'the file is of arch {arch!r}: set arch to that'
    if weights[_TIMM_MARK].shape[1] == 3 != backbone.stem.conv.in_channels:
        return (
            'the file is for images of 3 channels: set adapt_stem=True in the backbone to adapt '
            'the stem, or in_channels=3'
        )
    return 'check in_channels, that the file is whole, and that arch and checkpoint belong together'
