"""Run a trained segmentor or detector on images of any kind."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, cast

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import load_checkpoint
from PIL import Image, ImageOps
from torch import Tensor, nn

from .. import drawing
from ..backbones.multiscale import SMALLEST_IMAGE, MultiScale
from ..compat.logs import import_quietly, without_noise
from ..compat.torch_features import autocast
from ..engine.checks.config import ConfigError, datasets_of, metainfo_of, override
from ..engine.checks.findings import loading_error
from ..resources import find_config
from ..runs import find_checkpoint
from .results import Detections, Segmentation

TASKS = ('mmseg', 'mmdet')
DTYPES = ('float32', 'bfloat16', 'float16')
ORDERS = ('rgb', 'bgr')

#: The types that a Predictor takes as one image.
Input = Union[str, os.PathLike, np.ndarray, Image.Image, Tensor]  # noqa: UP007 - Python 3.9
Result = Union[Segmentation, Detections]  # noqa: UP007


@dataclass(frozen=True)
class Loaded:
    """An image that has passed the pipeline.

    Attributes:
        image: (H, W, 3) uint8 in RGB, for drawing.
        path: Path of the image; None if it was not read from a file.
        data: Input of the model's ``test_step`` for this image alone.
    """

    image: np.ndarray
    path: str | None
    data: dict

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the model's input; with TTA, that of the first augmentation."""
        inputs = self.data['inputs']
        return tuple((inputs[0] if isinstance(inputs, list) else inputs).shape)


class Predictor:
    """Find classes or objects in images with a trained segmentor or detector.

    ::

        predictor = polynext_mm.Predictor('work_dirs/my_config')
        result = predictor('field.jpg')
        result.labels                # (H, W): the class of each pixel, an index into result.classes
        result.save('drawn.png')

    Args:
        config: A work dir with a config and checkpoints; or a config: a file, or the name of one
            of ours.
        checkpoint: Path, url or published name; or, in the work dir, the name of a file, 'best' or
            'last'. None takes the best in the work dir, or the newest if there is no best.
        device: Such as 'cuda:0' or 'cpu'; None for a GPU if there is one, else the CPU.
        dtype: The dtype of autocast: 'bfloat16', 'float16' or torch's dtypes; None is float32.
        batch_size: Maximum number of images at once. A batch has images of one size, so it helps
            only with lists of images of equal size.
        tta: Whether to average over flips and scales, by the config's ``tta_model``.
        slide: Segment images at their own size, in windows of this side that overlap by a third.
        score_thr: Detections with scores up to this are dropped.
        cfg_options: Settings of the config to override, with dotted keys.

    Attributes:
        model: The segmentor or detector, in eval mode.
        classes: Names of the classes.
        palette: A colour, (R, G, B), for each.
        detects: Whether it is a detector.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint; the message lists those found.
        CheckpointError: If the checkpoint cannot be read, or does not fit.
        ConfigError: If the config is neither a segmentor's nor a detector's, or an option does not
            go with it.
    """

    def __init__(
        self,
        config: str | os.PathLike,
        checkpoint: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        batch_size: int = 1,
        tta: bool = False,
        slide: int | None = None,
        score_thr: float = 0.3,
        cfg_options: Mapping[str, Any] | None = None,
    ):
        path = find_config(os.fspath(config))
        with without_noise():  # from custom_imports
            cfg = Config.fromfile(path)
        override(cfg, cfg_options)
        self.detects = _require_task(cfg, path) == 'mmdet'
        if slide is not None and self.detects:
            raise ConfigError(f'slide is for segmentors, and {path} is a detector')
        if tta and not (cfg.get('tta_model') and cfg.get('tta_pipeline')):
            raise ConfigError(f'tta: {path} has no tta_model and tta_pipeline')
        if slide is not None:
            stride = max(1, slide * 2 // 3)
            cfg.model.test_cfg = dict(mode='slide', crop_size=(slide, slide), stride=[stride] * 2)
        if batch_size < 1:
            raise ValueError(f'batch_size must be 1 or more, got {batch_size}')
        self.dtype = _dtype(dtype)
        self.batch_size = batch_size
        self.score_thr = score_thr
        self.tta = tta
        source = find_checkpoint(os.fspath(config), checkpoint)
        self.model = build_model(cfg, source, _device(device))
        described = cast('dict[str, Any]', self.model.dataset_meta)
        self.classes = tuple(map(str, described['classes']))
        self.palette = drawing.colours(described.get('palette'), len(self.classes))
        self._step: BaseModel = self.model
        steps = cfg.test_dataloader.dataset.pipeline
        if tta:
            self._step = MODELS.build(dict(cfg.tta_model, module=self.model))
            steps = cfg.tta_pipeline
        self._reader, *rest = _steps(steps, keep_size=slide is not None)
        self._read = TRANSFORMS.build(self._reader)
        self._prepare = Compose(rest)

    def __call__(
        self,
        images: Input | Iterable[Input],
        channel_order: str = 'rgb',
        logits: bool = False,
    ) -> Result | list[Result] | Iterator[Result]:
        """Predict for one image or for many.

        Args:
            images: A path; an array (H, W, 3) or grey (H, W), uint8 or floats from 0 to 255; a PIL
                image; a tensor (3, H, W), uint8 or floats from 0 to 1; a list of these, or a batch
                with one more dimension in front; a generator of these. Values are those of an
                image file: do not normalize or resize beforehand.
            channel_order: 'rgb' or 'bgr' (as in OpenCV and mm), for arrays and tensors; files and
                PIL images have a known order.
            logits: Whether results of segmentors have ``logits``, at the size of the image.

        Returns:
            A :class:`Segmentation` or :class:`Detections` for one image; a list of them for a list
            or a batch; an iterator, which predicts as it is read, for any other iterable.

        Raises:
            DataError: For a file that cannot be read, naming it.
            ValueError: For arrays of other shapes, and for logits that the model does not have.
        """
        if channel_order not in ORDERS:
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
        if logits and (self.detects or self.tta):
            what = 'a detector has none' if self.detects else 'tta averages probabilities'
            raise ValueError(f'logits=True: {what}')
        if isinstance(images, (str, os.PathLike, Image.Image)):
            return next(self._results([images], channel_order, logits))
        if isinstance(images, (np.ndarray, Tensor)):
            if images.ndim < 4:
                return next(self._results([images], channel_order, logits))
            return list(self._results(images, channel_order, logits))
        if isinstance(images, Sequence):
            return list(self._results(images, channel_order, logits))
        return self._results(images, channel_order, logits)

    def _results(self, images: Iterable[Input], order: str, logits: bool) -> Iterator[Result]:
        return self.predict((self.load(image, order) for image in images), logits)

    def load(self, image: Input, channel_order: str = 'rgb') -> Loaded:
        """Read an image and prepare it as input of the model.

        Raises:
            DataError: For a file that cannot be read, naming it.
            ValueError: For arrays of other shapes.
        """
        if isinstance(image, (str, os.PathLike)):
            path = os.fspath(image)
            info: dict[str, Any] = dict(img_path=path, img_id=0)
            try:
                info = self._read(info)
            except Exception as error:  # noqa: BLE001 - decoders can raise anything
                raise loading_error([path], error) from error
        else:
            path = None
            pixels = _as_bgr(image, channel_order)
            self._require_readable(pixels)
            if self._reader.get('to_float32'):
                pixels = pixels.astype(np.float32)
            size = pixels.shape[:2]
            info = dict(img_path=None, img_id=0, img=pixels, img_shape=size, ori_shape=size)
        shown = drawing.as_shown(info['img'])
        data = self._prepare(info)
        if not self.detects:
            _widen(data, self.model)
        return Loaded(shown, path, data)

    def _require_readable(self, pixels: np.ndarray) -> None:
        """Check an image in memory as far as a file's decoder would have changed it.

        Raises:
            ValueError: If it has other channels than the model, or integers beyond 8 bits that the
                pipeline would not have read from a file.
        """
        means = getattr(getattr(self.model, 'data_preprocessor', None), 'mean', None)
        channels = 0 if means is None else means.numel()
        if channels > 1 and pixels.shape[-1] != channels:
            raise ValueError(
                f'the model takes images of {channels} channels, got {pixels.shape[-1]}'
            )
        if self._reader.get('color_type') != 'unchanged' and pixels.dtype != np.uint8:
            low, high = pixels.min(), pixels.max()
            if low < 0 or high > 255:
                raise ValueError(
                    f'an image has values from 0 to 255, got {low} to {high}: divide those of 16 '
                    'bits by 257'
                )

    def predict(self, images: Iterable[Loaded], logits: bool = False) -> Iterator[Result]:
        """Yield a result for each image, in order, predicting batches of images of one size."""
        batch: list[Loaded] = []
        for image in images:
            if len(batch) == self.batch_size or (batch and batch[0].shape != image.shape):
                yield from self._predict(batch, logits)
                batch = []
            batch.append(image)
        if batch:
            yield from self._predict(batch, logits)

    @torch.no_grad()
    def _predict(self, batch: Sequence[Loaded], logits: bool) -> list[Result]:
        keys = ('inputs', 'data_samples')
        data = {key: [one.data[key] for one in batch] for key in keys}
        if self.tta:  # by augmentation, then by image
            data = {key: [list(views) for views in zip(*values)] for key, values in data.items()}
        kind = next(self.model.parameters()).device.type
        with autocast(kind, self.dtype):
            samples = self._step.test_step(data)
        make = self._detections if self.detects else self._segmentation
        return [make(one, sample, logits) for one, sample in zip(batch, samples)]

    def _segmentation(self, loaded: Loaded, sample: Any, logits: bool) -> Segmentation:
        # a model with one logit predicts floats
        labels = sample.pred_sem_seg.data.reshape(loaded.image.shape[:2]).cpu().numpy()
        return Segmentation(
            loaded.image,
            self.classes,
            self.palette,
            loaded.path,
            labels.astype(np.uint8 if len(self.classes) <= 256 else np.uint16),
            sample.seg_logits.data.float().cpu().numpy() if logits else None,
        )

    def _detections(self, loaded: Loaded, sample: Any, logits: bool) -> Detections:
        found = sample.pred_instances.cpu()
        order = found.scores.argsort(descending=True, stable=True)
        scores = found.scores[order].float()
        count = int((scores > self.score_thr).sum())
        kept = order[:count]
        left_out = float(scores[count]) if count < len(scores) else None
        masks = found.masks[kept].numpy().astype(bool) if 'masks' in found else None
        return Detections(
            loaded.image,
            self.classes,
            self.palette,
            loaded.path,
            found.bboxes[kept].float().numpy(),
            scores[:count].numpy(),
            found.labels[kept].numpy(),
            masks,
            left_out,
        )


def build_model(cfg: Config, checkpoint: str, device: str | torch.device) -> nn.Module:
    """Return the model of a config in eval mode with the weights of a checkpoint.

    It gets the attributes ``cfg`` and ``dataset_meta``, as from mm's own functions. If the
    checkpoint does not name the classes, they come from the config's data set; mm would guess.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or, with a backbone of this package, does not fit
            backbone and heads. Other models are loaded as mm loads them.
    """
    cfg = copy.deepcopy(cfg)
    for name in ('pretrained', 'train_cfg'):
        if name in cfg.model:
            cfg.model[name] = None
    for part in cfg.model.values():  # the checkpoint provides the weights
        if isinstance(part, dict) and part.get('init_cfg'):
            part['init_cfg'] = None
    for part in ('models', 'datasets'):
        import_quietly(f'{cfg.default_scope}.{part}')
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    logger = MMLogger.get_current_instance()  # without one, mmengine prints
    meta = load_checkpoint(model, checkpoint, map_location='cpu', logger=logger).get('meta') or {}
    known = {str(key).lower(): value for key, value in (meta.get('dataset_meta') or meta).items()}
    described = {key: known[key] for key in ('classes', 'palette') if known.get(key)}
    if 'classes' not in described or (cfg.default_scope == 'mmdet' and 'palette' not in described):
        datasets = datasets_of(cfg.test_dataloader.dataset, 'test_dataloader.dataset')
        own = next((metainfo_of(cfg, dataset) for _, dataset in datasets), {})
        described = {**own, **described}
    if not described.get('classes'):
        raise ConfigError(
            f'neither {checkpoint} nor {cfg.filename} names the classes: set '
            'test_dataloader.dataset.metainfo=dict(classes=...) in the config'
        )
    model.dataset_meta = described
    model.cfg = cfg
    return model.to(device).eval()


def _require_task(cfg: Config, path: str) -> str:
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise ConfigError(
            f'{path}: default_scope must be one of {", ".join(TASKS)}, since it names the task; '
            f'got {scope!r}'
        )
    return scope


def _device(name: str | torch.device | None) -> str | torch.device:
    if name is None:
        return get_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = ' '.join(str(error).partition('\n')[0].split())
        raise ConfigError(f'device {name} cannot be used: {reason}') from error
    return name


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    name = str(dtype or 'float32').removeprefix('torch.')
    if name not in DTYPES:
        raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}')
    return getattr(torch, name)


# From images to the input of the model


def _steps(pipeline: Sequence[Any], keep_size: bool) -> list[Any]:
    """Return a pipeline's steps, except those for annotations and, on request, for resizing."""
    kept = []
    for step in pipeline:
        if not isinstance(step, Mapping) or 'type' not in step:
            kept.append(step)  # already built
            continue
        kind = str(step['type']).split('.')[-1]
        if kind.endswith('LoadAnnotations') or (keep_size and kind.endswith('Resize')):
            continue
        step = dict(step)
        if kind == 'TestTimeAug':
            nested = [_steps(alternatives, keep_size) for alternatives in step['transforms']]
            step['transforms'] = [alternatives for alternatives in nested if alternatives]
        kept.append(step)
    return kept


def _as_bgr(image: Any, order: str) -> np.ndarray:
    """Convert an image in memory to what mm reads from files: (H, W, C), BGR, from 0 to 255."""
    if isinstance(image, Image.Image):
        # as for files, apply the EXIF orientation
        image = ImageOps.exif_transpose(image)
        if not image.mode.startswith(('I', 'F')):  # which Pillow would clip to 8 bits
            return np.asarray(image.convert('RGB'))[..., ::-1].copy()
        image = np.asarray(image)
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            pixels = pixels.float() * 255
        array = np.moveaxis(pixels.numpy(), 0, -1) if pixels.ndim == 3 else pixels.numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(
            f'an image is a path, an array, a PIL image or a tensor, not a {type(image).__name__}'
        )
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, -1)
    if array.ndim != 3 or 0 in array.shape or (isinstance(image, Tensor) and image.shape[0] > 16):
        wanted = '(channels, height, width)' if isinstance(image, Tensor) else '(height, width, 3)'
        raise ValueError(f'an image has the shape {wanted}, got {tuple(image.shape)}')
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, -1)
    if array.shape[-1] == 3 and order == 'rgb':
        array = array[..., ::-1]
    if array.dtype == bool or array.dtype.kind not in 'uif':
        raise ValueError(f'an image has values from 0 to 255, got the dtype {image.dtype}')
    if array.dtype.kind == 'f':
        if not np.isfinite(array).all():
            raise ValueError('an image has values from 0 to 255, got nan or inf')
        array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(array)


def _widen(data: dict, model: nn.Module) -> None:
    """Repeat the last row and column of images that are too small for a backbone of ours.

    mmseg crops the results to the image again.
    """
    padded = getattr(model.data_preprocessor, 'test_cfg', None)
    if padded or not isinstance(getattr(model, 'backbone', None), MultiScale):
        return
    many = isinstance(data['inputs'], list)
    inputs = data['inputs'] if many else [data['inputs']]
    samples = data['data_samples'] if many else [data['data_samples']]
    for index, (pixels, sample) in enumerate(zip(inputs, samples)):
        height, width = pixels.shape[-2:]
        down, right = (max(0, SMALLEST_IMAGE - side) for side in (height, width))
        if not down and not right:
            continue
        rows = torch.arange(height + down).clamp(max=height - 1)
        columns = torch.arange(width + right).clamp(max=width - 1)
        inputs[index] = pixels[..., rows, :][..., columns]
        size = (height + down, width + right)
        sample.set_metainfo(dict(img_shape=size, pad_shape=size, padding_size=[0, right, 0, down]))
    data['inputs'] = inputs if many else inputs[0]
