"""What `polynext-mm predict` computes and writes: pictures, videos, label maps and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import VISUALIZERS
from mmengine.utils import ProgressBar
from mmengine.visualization import BaseVisBackend
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from polynext_mm.engine.checks import config as config_checks
from polynext_mm.engine.checks.findings import file_fault
from polynext_mm.weights.reading import read_meta

from .arguments import UsageError
from .predict_inputs import Clip, Picture, files, frame_count, frames, frames_per_second

TASKS = ('mmseg', 'mmdet')


@dataclass(frozen=True)
class Item:
    """An image on its way through the model.

    Args:
        name: As results name it.
        image: (H, W, 3) uint8 in BGR.
        label_name: The file of its label map, below their folder.
        picture: Where it was read from; None for a frame of a clip.
    """

    name: str
    image: np.ndarray
    label_name: str
    picture: Picture | None = None


class Predictor:
    """A model with the pipeline that its config tests with.

    Args:
        model: From :func:`build_model`.
        batch_size: Most images at once; those in one batch have one size.
        dtype: Of autocast; float32 for none.
        keep_size: Whether the pipeline does not resize.
    """

    def __init__(self, model: nn.Module, batch_size: int, dtype: str, keep_size: bool):
        self.model = model
        self.batch_size = batch_size
        self.dtype = getattr(torch, dtype)
        self.detects = model.cfg.default_scope == 'mmdet'
        transforms = [
            dict(transform)
            for transform in model.cfg.test_dataloader.dataset.pipeline
            if not transform['type'].endswith('LoadAnnotations')
            and not (keep_size and transform['type'].endswith('Resize'))
        ]
        self.load_file = Compose(transforms)
        self.load_frame = Compose([dict(type='LoadImageFromNDArray'), *transforms[1:]])

    def __call__(self, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield every item with its data sample, as mm predicts it."""
        batch: list[tuple[Item, dict]] = []
        for item in items:
            data = self._load(item)
            shape = data['inputs'].shape
            if len(batch) == self.batch_size or (batch and batch[0][1]['inputs'].shape != shape):
                yield from self._predict(batch)
                batch = []
            batch.append((item, data))
        if batch:
            yield from self._predict(batch)

    def _load(self, item: Item) -> dict:
        # PackDetInputs wants an id
        if item.picture is not None:
            return self.load_file(dict(img_path=str(item.picture.path), img_id=0))
        return self.load_frame(dict(img=item.image, img_id=0))

    @torch.no_grad()
    def _predict(self, batch: Sequence[tuple[Item, dict]]) -> Iterator[tuple[Item, Any]]:
        device = next(self.model.parameters()).device.type
        data = {key: [one[key] for _, one in batch] for key in ('inputs', 'data_samples')}
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            samples = self.model.test_step(data)
        return zip([item for item, _ in batch], map(_in_float32, samples))


def _in_float32(sample: Any) -> Any:
    """Return a data sample whose detections NumPy can take."""
    if 'pred_instances' in sample:
        for name, value in sample.pred_instances.items():
            if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                sample.pred_instances.set_field(value.float(), name)
    return sample


def load(path: str, args: argparse.Namespace) -> Predictor:
    """Return the predictor of a config and the command line.

    Raises:
        UsageError: If the config is no segmentor's or detector's, or an option does not go with it.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or does not fit.
    """
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(args.cfg_options or {})
    if cfg.get('default_scope') not in TASKS:
        raise UsageError(
            f'{path}: default_scope must be one of {", ".join(TASKS)}, since it names the task; '
            f'got {cfg.get("default_scope")!r}'
        )
    if cfg.default_scope == 'mmdet':
        for option in ('slide', 'labels', 'legend'):
            if getattr(args, option):
                raise UsageError(f'--{option} is for segmentors, and {path} is a detector')
    if args.slide is not None:
        stride = max(1, args.slide * 2 // 3)
        cfg.model.test_cfg = dict(
            mode='slide', crop_size=(args.slide, args.slide), stride=(stride, stride)
        )
    model = build_model(cfg, args.checkpoint, _device(args.device))
    return Predictor(model, args.batch_size, args.dtype, args.slide is not None)


def _device(name: str | None) -> str:
    if name is None:
        return get_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = ' '.join(str(error).partition('\n')[0].split())
        raise UsageError(f'--device {name} cannot be used: {reason}') from error
    return name


def build_model(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    """Return the model in eval mode with the weights of the checkpoint.

    Classes that the checkpoint does not name are those of the config's data set. mm would guess.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it cannot be read, or, with a backbone of this package, does not fit
            backbone and heads. Other models are loaded as mm loads them.
    """
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import init_model as init
    model = init(cfg, checkpoint, device=device)
    if not {'dataset_meta', 'CLASSES'} & set(read_meta(checkpoint)):
        datasets = config_checks.datasets_of(cfg.test_dataloader.dataset, 'test_dataloader.dataset')
        for _, dataset in datasets:
            model.dataset_meta = {**model.dataset_meta, **config_checks.metainfo_of(cfg, dataset)}
            break
    return model


class LastImage(BaseVisBackend):
    """Keeps what a visualizer draws."""

    def __init__(self):
        super().__init__(None)
        self.image: np.ndarray | None = None

    def _init_env(self) -> None:
        pass

    @property
    def experiment(self) -> LastImage:
        return self

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        self.image = image


class VideoFile:
    """A video that is opened with its first frame, whose size it has.

    Args:
        path: The file; its suffix chooses the codec.
        rate: Frames per second.
    """

    _CODECS = {'.avi': 'MJPG', '.webm': 'VP80', '.wmv': 'WMV2'}

    def __init__(self, path: Path, rate: float):
        self.path, self.rate = path, rate
        self.size: tuple[int, int] | None = None
        self.video: cv2.VideoWriter | None = None

    def write(self, image: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 in RGB.

        Raises:
            UsageError: If OpenCV cannot write such a file.
        """
        frame = mmcv.rgb2bgr(image)
        if self.video is None:
            self.size = frame.shape[1::-1]
            codec = cv2.VideoWriter_fourcc(*self._CODECS.get(self.path.suffix.lower(), 'mp4v'))
            self.video = cv2.VideoWriter(str(self.path), codec, self.rate, self.size)
            if not self.video.isOpened():
                raise UsageError(f'OpenCV cannot write {self.path}: use .mp4 or .avi')
        if frame.shape[1::-1] != self.size:  # legends differ in height
            fitted = np.full((self.size[1], self.size[0], 3), 255, np.uint8)
            height, width = (min(n, m) for n, m in zip(frame.shape, fitted.shape[:2]))
            fitted[:height, :width] = frame[:height, :width]
            frame = fitted
        self.video.write(frame)

    def close(self) -> None:
        if self.video is not None:
            self.video.release()


class Writer:
    """Draws predictions, and writes pictures and results.

    Args:
        predictor: Of the model.
        args: Of the command line.
        inputs: All that will be drawn.

    Raises:
        UsageError: If two label maps would have one name, or one that of an input.
    """

    def __init__(
        self, predictor: Predictor, args: argparse.Namespace, inputs: Sequence[Picture | Clip]
    ):
        self.predict = predictor
        self.labels: Path | None = args.labels
        self.json: Path | None = args.json
        self.legend: bool = args.legend
        self.score_thr: float = args.score_thr
        meta = dict(predictor.model.dataset_meta)
        if not isinstance(meta.get('palette'), (str, type(None))):
            meta['palette'] = [tuple(colour) for colour in meta['palette']]  # no lists for mmdet's
        self.classes: Sequence[str] = meta['classes']
        self.palette = meta.get('palette')
        settings = dict(predictor.model.cfg.visualizer, vis_backends=[LastImage()])
        with VISUALIZERS.switch_scope_and_registry(None) as visualizers:
            # build would return an earlier visualizer of the same name, with its backends
            self.visualizer = visualizers.get(settings.pop('type'))(**settings)
        self.drawn = self.visualizer.get_backend('LastImage')
        self.visualizer.dataset_meta = meta
        if args.opacity is not None:
            self.visualizer.alpha = args.opacity
        self.label_stems = _label_stems(inputs, args.labels)
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def draw_pictures(self, pictures: Sequence[Picture]) -> list[str]:
        """Draw and write pictures; return what is wrong with those that cannot be read."""
        Image.MAX_IMAGE_PIXELS = None  # large pictures are meant to be
        broken: list[str] = []
        bar = Progress(len(pictures) if len(pictures) > 1 else None)
        for item, sample in self.predict(self._readable(pictures, broken, bar)):
            target = item.picture.target
            target.parent.mkdir(parents=True, exist_ok=True)
            mmcv.imwrite(mmcv.rgb2bgr(self._draw(item, sample)), str(target))
            self._note(item, sample)
            bar.advance()
            if len(pictures) == 1:
                print(target)
        bar.close()
        written = len(pictures) - len(broken)
        if len(pictures) > 1 and written:
            folders = sorted({str(picture.target.parent) for picture in pictures})
            print(f'wrote {written} pictures to {", ".join(folders)}')
        return broken

    def _readable(
        self, pictures: Sequence[Picture], broken: list[str], bar: Progress
    ) -> Iterator[Item]:
        for picture in pictures:
            fault = file_fault(picture.path)
            image = mmcv.imread(str(picture.path)) if fault is None else None
            if image is None:
                broken.append(
                    fault.what if fault else f'{picture.path} is of a kind that OpenCV cannot read'
                )
                bar.advance()
            else:
                label_name = f'{self.label_stems[picture]}.png'
                yield Item(str(picture.path), image, label_name, picture)

    def draw_clip(self, clip: Clip, max_frames: int | None) -> None:
        """Draw and write a video, or what a camera sees until Ctrl-C.

        Raises:
            UsageError: If it cannot be opened, or has no frames.
        """
        capture = clip.open()
        count = frame_count(capture)
        total = min(filter(None, (count, max_frames)), default=None)
        if not count:
            print(f'recording {clip.name} to {clip.target}; Ctrl-C ends', file=sys.stderr)
        numbered = enumerate(islice(frames(capture), max_frames))
        stem = self.label_stems[clip]
        items = (
            Item(f'{clip.name}_{index:06}', frame, f'{stem}_{index:06}.png')
            for index, frame in numbered
        )
        first = next(items, None)
        if first is None:
            raise UsageError(f'{clip.source} has no frames')
        clip.target.parent.mkdir(parents=True, exist_ok=True)
        video, bar = VideoFile(clip.target, frames_per_second(capture)), Progress(total)
        try:
            for item, sample in self.predict(chain([first], items)):
                video.write(self._draw(item, sample))
                self._note(item, sample)
                bar.advance()
        except KeyboardInterrupt:  # how a camera ends
            print('ended by Ctrl-C', file=sys.stderr)
        finally:
            video.close()
        bar.close()
        print(clip.target)

    def _draw(self, item: Item, sample: Any) -> np.ndarray:
        """Return the image with its predictions, (H, W, 3) uint8 in RGB."""
        if self.predict.detects:
            options = dict(pred_score_thr=self.score_thr)
        else:
            options = dict(with_labels=not self.legend)
        image = mmcv.bgr2rgb(item.image)
        self.visualizer.add_datasample(item.name, image, sample, draw_gt=False, **options)
        if not self.legend:
            return self.drawn.image
        shares = class_shares(sample, len(self.classes))
        present = [index for index in np.argsort(-shares) if shares[index]]
        entries = [(self.classes[index], self.palette[index]) for index in present]
        return with_legend(self.drawn.image, entries)

    def _note(self, item: Item, sample: Any) -> None:
        """Write the label map of an image, and keep its results for the JSON file."""
        if self.labels is not None:
            ids = sample.pred_sem_seg.data[0].cpu().numpy()
            ids = ids.astype(np.uint8 if len(self.classes) <= 256 else np.uint16)
            target = self.labels / item.label_name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(target)
        if self.json is None:
            return
        height, width = item.image.shape[:2]
        entry = dict(id=len(self.images), file_name=item.name, width=width, height=height)
        self.images.append(entry)
        if self.predict.detects:
            self.annotations += coco_annotations(
                sample.pred_instances, entry['id'], len(self.annotations), self.score_thr
            )
        else:
            shares = class_shares(sample, len(self.classes))
            entry['shares'] = {
                str(self.classes[index]): round(float(share), 6)
                for index, share in enumerate(shares)
                if share
            }

    def finish(self) -> None:
        """Write the JSON file, if one is wanted."""
        if self.json is None:
            return
        first = 1 if self.predict.detects else 0
        categories = [dict(id=first + i, name=str(name)) for i, name in enumerate(self.classes)]
        content = dict(images=self.images, categories=categories)
        if self.predict.detects:
            content['annotations'] = self.annotations
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(content))
        print(self.json)


def _label_stems(inputs: Sequence[Picture | Clip], folder: Path | None) -> dict:
    """Return what label maps are called below their folder: as the inputs, without a suffix.

    Args:
        inputs: All of them.
        folder: For label maps; None if none are written.

    Raises:
        UsageError: If two would have one name, or one that of an input.
    """
    if len(inputs) == 1:
        stems = {inputs[0]: inputs[0].name}
    else:
        top = os.path.commonpath([one.target.parent for one in inputs])
        stems = {one: str(one.target.relative_to(top).with_suffix('')) for one in inputs}
    if folder is not None:
        repeated = [stem for stem, count in Counter(stems.values()).items() if count > 1]
        if repeated:
            raise UsageError(
                f'--labels: two inputs would be written to {repeated[0]}.png: rename one'
            )
        originals = files(inputs)
        for stem in stems.values():
            target = folder / f'{stem}.png'
            if target.resolve() in originals:
                raise UsageError(
                    f'--labels: {target} is an input and would be overwritten: take another folder'
                )
    return stems


def class_shares(sample: Any, num_classes: int) -> np.ndarray:
    """Return the share of every class in the pixels of a segmented image, in shape (classes,)."""
    ids = sample.pred_sem_seg.data.flatten().cpu()
    return torch.bincount(ids, minlength=num_classes)[:num_classes].numpy() / len(ids)


def coco_annotations(instances: Any, image_id: int, first: int, score_thr: float) -> list[dict]:
    """Return detections as annotations of COCO's format, with their scores.

    Args:
        instances: mmdet's ``pred_instances``.
        image_id: Of the image.
        first: Annotations of earlier images; ids go on from there.
        score_thr: Only detections with higher scores.
    """
    instances = instances[instances.scores > score_thr].cpu()
    boxes = instances.bboxes.float()
    sizes = boxes[:, 2:] - boxes[:, :2]
    found = []
    for index in range(len(instances)):
        width, height = sizes[index].tolist()
        found.append(
            dict(
                id=first + index + 1,
                image_id=image_id,
                category_id=int(instances.labels[index]) + 1,
                bbox=[*boxes[index, :2].tolist(), width, height],
                area=width * height,
                score=float(instances.scores[index]),
                iscrowd=0,
            )
        )
    if 'masks' in instances:
        from mmdet.structures.mask import encode_mask_results

        masks = instances.masks.numpy()
        for annotation, mask, code in zip(found, masks, encode_mask_results(masks)):
            annotation['segmentation'] = dict(code, counts=code['counts'].decode())
            annotation['area'] = int(mask.sum())
    return found


def with_legend(image: np.ndarray, entries: Sequence[tuple[str, tuple]]) -> np.ndarray:
    """Return an image with a strip below that names colours.

    Args:
        image: (H, W, 3) uint8 in RGB.
        entries: Names, and colours as (R, G, B).

    Returns:
        The image, of the same width, or at least as wide as the longest name needs.
    """
    size = max(11, min(image.shape[:2]) // 40)
    font, gap = ImageFont.load_default(size), size // 2
    widths = [2 * size + gap + int(font.getlength(name)) for name, _ in entries]
    total = max([image.shape[1], *widths])
    rows: list[list] = []
    used = total
    for entry, width in zip(entries, widths):
        if used + width > total:
            rows.append([])
            used = 0
        rows[-1].append((used, entry))
        used += width
    line = size + gap
    canvas = Image.new('RGB', (total, image.shape[0] + line * len(rows) + gap), 'white')
    canvas.paste(Image.fromarray(image))
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        top = image.shape[0] + gap + number * line
        for left, (name, colour) in row:
            pen.rectangle((left + gap, top, left + gap + size, top + size), colour, 'gray')
            pen.text((left + 2 * gap + size, top), name, 'black', font)
    return np.asarray(canvas)


class Progress:
    """mmengine's progress bar, with rate and time left, on stderr; nothing without a total."""

    def __init__(self, total: int | None):
        self.bar = ProgressBar(total, file=sys.stderr) if total else None

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            print(file=sys.stderr)
