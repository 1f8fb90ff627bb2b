"""PolyNeXt in timm: importing this registers every arch, and all classifiers of the release.

::

    import polynext_mm.timm
    import timm

    timm.create_model('cpolynext_s', pretrained=True)
    timm.create_model('apolynext_t', features_only=True, out_indices=(1, 2, 3))
    timm.create_model('cpolynext_t_bn', pretrained=True)  # fully polynomial
    timm.create_model('cpolynext_lr.svhn', pretrained=True)  # or .cifar10, .tiny_imagenet

Those are the nine archs, and the fully polynomial networks with a published file under a name of
their own; ``norm='bn'`` makes such a network of any arch.
Neither mmengine nor any other package of OpenMMLab is needed. Names of weights are those of
:class:`polynext_mm.nn.PolyNeXtClassifier`; files in the names of the authors' release are
translated wherever timm loads them: with ``pretrained=True``,
``pretrained_cfg_overlay=dict(file=PATH)`` or ``checkpoint_path=PATH``, and by the ``--checkpoint``
of its scripts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compat.optional import require_timm
from .compat.torch_features import register_load_state_dict_pre_hook
from .nn import ARCHS, PolyNeXtClassifier
from .nn import PolyNeXt as PolyNeXtNetwork
from .nn.batch_norm import PositionNorm
from .nn.cell import Stage
from .nn.classifier import Classifier
from .nn.layers import LayerNorm, MakeNorm
from .normalization import IMAGENET, LOW_RESOLUTION, Normalization
from .weights import PUBLISHED, Published, downloads, loading, names

require_timm()

from timm.models import (  # noqa: E402 - the line above says how to install it
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._builder import resolve_pretrained_cfg  # noqa: E402
from timm.models._features import FeatureGetterNet, feature_take_indices  # noqa: E402

__all__ = ['PolyNeXt']
_POOLS = ('avg', '')
_PRUNED = 'the classifier was removed by prune_intermediate_layers()'

# torch.fx treats a stage as a leaf, since its control flow depends on the input tensors
register_notrace_module(Stage)


@register_notrace_module
class Head(Classifier):
    """The released classifier with timm's options.

    Args:
        channels: C, of the last stage.
        num_classes: Number of logits; 0 leaves the last layer out.
        drop_rate: Dropout before the last layer.
        global_pool: 'avg', or '' to return a map instead of its mean.
        norm: Makes the norm.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        drop_rate: float,
        global_pool: str,
        norm: MakeNorm = LayerNorm,
    ):
        super().__init__(channels, num_classes, drop_rate, norm)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str) -> None:
        """Replace the last layer and the pooling.

        Raises:
            ValueError: For another pooling, or logits of a map.
        """
        if global_pool not in _POOLS:
            raise ValueError(f'global_pool must be one of {_POOLS}, got {global_pool!r}')
        if num_classes and not global_pool:
            raise ValueError("logits need pooling: set global_pool='avg', or num_classes=0")
        self.global_pool = global_pool
        weight = self.proj.weight
        self.fc = (
            nn.Linear(len(weight) // 2, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature (B, C, H, W), or the input of the last layer."""
        x = self.products(feature)
        x = self.dropout(x.mean((1, 2)) if self.global_pool else x.permute(0, 3, 1, 2))
        return x if pre_logits else self.fc(x)


class PolyNeXt(PolyNeXtNetwork):
    """PolyNeXt with the released classifier and the methods of timm's models.

    Args:
        arch: A name of ``polynext_mm.nn.ARCHS``, or a custom arch.
        num_classes: Of the logits; 0 leaves the last layer out.
        in_chans: Of the image.
        global_pool: 'avg', or '' for no pooling, which goes with ``num_classes=0``.
        drop_rate: Dropout before the last layer.
        drop_path_rate: Stochastic depth of the last cell; rises linearly from 0.
        norm: 'ln', or 'bn' for the fully polynomial network.
        norm_size: For 'bn', the side, or height and width, of the images that the norms' weights
            and statistics are for; loaded weights are resized to it. By default it is that of the
            loaded file, or 224, and the first batch of a training in one process changes it to the
            size of its images. With several processes or an average of the weights, set it to the
            crop (``--model-kwargs norm_size=160`` of timm's scripts): both copy the shapes before
            the first batch.
        sync_norm: For 'bn', take statistics over the batches of all processes in training.
        output_stride: Must be 32, which scripts on top of timm pass to any network, or the arch's
            own stride: no stage can be dilated.

    Raises:
        ValueError: For values that are not valid, naming those that are.

    Attributes:
        outs: Identity modules that every feature passes through, for hooks.
        num_features: Channels of :meth:`forward_features`.
        head_hidden_size: Channels of :meth:`forward_head` before the last layer.
        feature_info: Channels, stride and module of the feature of every stage.
    """

    def __init__(
        self,
        arch: str | Mapping = 'cpolynext_s',
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm: str = 'ln',
        norm_size: int | Sequence[int] | None = None,
        sync_norm: bool = False,
        output_stride: int = 32,
    ):
        super().__init__(
            arch, in_chans, drop_path_rate, norm=norm, norm_size=norm_size, sync_norm=sync_norm
        )
        widths, strides = self.arch.widths, self.arch.strides
        if output_stride not in (32, strides[-1]):
            raise ValueError(
                f'output_stride must be {strides[-1]}, got {output_stride!r}: PolyNeXt has no '
                'dilated stages. In segmentation_models.pytorch set encoder_output_stride=32'
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.head_hidden_size = 2 * widths[-1]
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=width, reduction=stride, module=f'outs.{stage}')
            for stage, (width, stride) in enumerate(zip(widths, strides))
        ]
        self.outs = nn.ModuleList(nn.Identity() for _ in widths)
        self.head: Head | None = Head(
            widths[-1], num_classes, drop_rate, global_pool, self.norm_maker(len(widths) - 1)
        )
        self._files_tell_norm_size = norm_size is None
        register_load_state_dict_pre_hook(self, _translate)
        self.register_load_state_dict_post_hook(_agree_on_norm_size)

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the feature of every stage."""
        for out, feature in zip(self.outs, super().forward_stages(x)):
            yield out(feature)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature of images (B, in_chans, H, W), at the last stage's stride."""
        *_, last = self.forward_stages(x)
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature, or the input of the last layer."""
        return x if self.head is None else self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override] # logits, not features
        """Return the logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return features of several stages, and the last one.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Stages, -1 being the last; a number n for the last n, None for all.
            norm: Must be False: released classifiers have no norms of features.
            stop_early: Compute no stage after the last of ``indices``.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the features of ``indices`` alone.

        Raises:
            ValueError: For another ``norm`` or ``output_fmt``.
        """
        if norm:
            raise ValueError('norm must be False: PolyNeXt has no norms of its features')
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        features = []
        for stage, feature in enumerate(self.forward_stages(x)):
            features.append(feature)
            if stop_early and stage == last:
                break
        intermediates = [features[index] for index in sorted(set(taken))]
        return intermediates if intermediates_only else (features[-1], intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need, and return the stages kept.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Without effect: there are no norms of features.
            prune_head: Remove the classifier even if all stages are kept.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if pruned or prune_head:
            self.head = None
            self.num_classes = 0
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        assert self.head is not None, _PRUNED
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer.

        Args:
            num_classes: Of the logits; 0 leaves the last layer out.
            global_pool: 'avg' or ''; None keeps the present one.

        Raises:
            ValueError: For another pooling.
        """
        assert self.head is not None, _PRUNED
        self.num_classes = num_classes
        self.head.reset(num_classes, self.head.global_pool if global_pool is None else global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint every cell in training: less memory, more time."""
        for stage in self.stages:
            stage.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters for layer-wise learning rates."""
        cells = [
            (r'^stages\.(\d+)\.downsample', (0,)),
            (r'^stages\.(\d+)\.cells\.(\d+)', None),
            (r'^head\.(?:norm|proj)', (99999,)),  # with the last cell
        ]
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else cells)

    def no_weight_decay(self) -> set[str]:
        """Return the weights of norms whose shapes look like those of matrices."""
        return {
            f'{name}.{key}'
            for name, norm in self.named_modules()
            if isinstance(norm, PositionNorm)
            for key, param in norm.named_parameters()
            if param.ndim > 1
        }


class Features(FeatureGetterNet):
    """The features of several stages, as timm returns them, with gradient checkpointing."""

    model: PolyNeXt

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint every cell in training: less memory, more time."""
        self.model.set_grad_checkpointing(enable)


def _translate(model: PolyNeXt, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Rename weights from the authors' names to ours, in place."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    if names.is_authors({key.removeprefix(prefix) for key in keys}):
        weights = {key.removeprefix(prefix): state_dict.pop(key) for key in keys}
        weights = names.translate(weights, model.arch)
        state_dict.update({prefix + key: value for key, value in weights.items()})


def _agree_on_norm_size(model: PolyNeXt, _: object) -> None:
    """Resize loaded norms to ``norm_size``, or set that to the size loaded.

    Several processes keep this size: timm loads before DistributedDataParallel copies the shapes.
    """
    if model.given_norm_size is not None:  # norm='bn'
        if model._files_tell_norm_size:
            model.given_norm_size = model.norm_size
        else:
            model.set_norm_size(model.given_norm_size)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: PolyNeXt) -> dict[str, Tensor]:
    """Translate and check pretrained weights, before timm fits them to other images and classes.

    Args:
        state_dict: Weights in the authors' names or ours.
        model: The model, possibly with other numbers of classes and of image channels.

    Raises:
        CheckpointError: If anything is missing or left over, or of another shape than that of the
            arch, but for the stem's channels, the classes and the size of fully polynomial norms.
    """
    weights = dict(state_dict)
    stem = weights.get('stem.weight')
    logits = weights.get('head.3.bias', weights.get('head.fc.bias'))
    with torch.device('meta'):
        network = PolyNeXtClassifier(
            model.arch,
            num_classes=1000 if logits is None else len(logits),
            in_channels=3 if stem is None else stem.shape[1],
            norm=model.norm,
        )
    loading.adapt(network, weights, '', 'the pretrained file')
    return weights


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a released classifier was trained and measured on.

    Args:
        name: Name in the release.
        tag: Tag of the weights in timm's names.
        size: Side of the images.
        num_classes: Number of logits.
        crop_pct: Side of the crop over the side of the resized image.
        normalization: Normalization of the images.
    """

    name: str
    tag: str
    size: int
    num_classes: int
    crop_pct: float = 1.0
    normalization: Normalization = LOW_RESOLUTION


#: The training data of classifiers, by ``Published.holds``.
_DATA = {
    'imagenet': _Data(
        'ImageNet-1K',
        'in1k',
        224,
        1000,
        crop_pct=0.965,  # the release's: resize the shorter side to 232, crop 224
        normalization=IMAGENET,
    ),
    'cifar10': _Data('CIFAR-10', 'cifar10', 32, 10),
    'svhn': _Data('SVHN', 'svhn', 32, 10),
    'tiny_imagenet': _Data('Tiny-ImageNet', 'tiny_imagenet', 64, 200),
}


def _pretrained_cfg(published: Published) -> dict:
    data, stride = _DATA[published.holds], ARCHS[published.arch].strides[-1]
    return dict(
        url=published.url,
        input_size=(3, data.size, data.size),
        min_input_size=(3, stride, stride),
        pool_size=(data.size // stride, data.size // stride),
        num_classes=data.num_classes,
        interpolation='bicubic',
        crop_pct=data.crop_pct,
        mean=data.normalization.mean,
        std=data.normalization.std,
        first_conv='stem',
        classifier='head.fc',
        description=f'Published top-1 accuracy on {data.name}: {published.figure} percent',
        origin_url='https://github.com/jjwang8/PolyNeXt',
        paper_name='Activation-Free Backbones for Image Recognition: Polynomial Alternatives '
        'within MetaFormer-Style Vision Models',
        paper_ids='arXiv:2605.20839',
    )


def network_name(arch: str, norm: str) -> str:
    """Return the name of a published network in timm."""
    return arch if norm == 'ln' else f'{arch}_{norm}'


def _name(published: Published) -> str:
    return network_name(published.arch, published.norm)


_CLASSIFIERS = [published for published in PUBLISHED.values() if published.holds in _DATA]

#: The archs with published ImageNet weights.
IMAGENET_ARCHS = list(dict.fromkeys(p.arch for p in _CLASSIFIERS if p.holds == 'imagenet'))

default_cfgs = generate_default_cfgs(
    {f'{_name(p)}.{_DATA[p.holds].tag}': _pretrained_cfg(p) for p in _CLASSIFIERS}
)


def _with_file(
    name: str,
    pretrained_cfg: Any = None,  # timm's types have no PretrainedCfg here
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **_: object,
) -> dict | None:
    """Return settings that name the file of a published url, which mm and timm then share.

    Raises:
        CheckpointError: If it cannot be downloaded; the message says where to put it.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(
        name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay
    )
    urls = {published.url for published in _CLASSIFIERS}
    if cfg.url in urls and not (cfg.file or cfg.state_dict):
        overlay['file'] = str(downloads.fetch(cfg.url))
    return overlay or None


def _entrypoint(name: str, arch: str, norm: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options) -> nn.Module:
        if norm != 'ln' and options.setdefault('norm', norm) != norm:
            raise ValueError(
                f'{name} is {arch} with norm={norm!r}, got norm={options["norm"]!r}: '
                f'create {arch} instead'
            )
        # timm's 'list' and 'dict' rebuild a network of layers that follow each other; cells here
        # have two streams
        if options.get('feature_cls') in ('list', 'getter'):
            del options['feature_cls']
        if options.get('feature_cls') == 'dict':
            raise ValueError("feature_cls must be 'list', 'getter', 'hook' or 'fx', got 'dict'")
        if pretrained:
            options['pretrained_cfg_overlay'] = _with_file(name, **options)
        return build_model_with_cfg(
            PolyNeXt,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(
                out_indices=tuple(range(len(ARCHS[arch].widths))), feature_cls=Features
            ),
            arch=arch,
            **options,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'Build {name} with the options of :class:`PolyNeXt` and of timm.'
    return create


for _published in {_name(p): p for p in _CLASSIFIERS}.values():
    globals()[_name(_published)] = register_model(
        _entrypoint(_name(_published), _published.arch, _published.norm)
    )
