"""The report of a training: curves, a table of the classes, and some pictures."""

from __future__ import annotations

import contextlib
import csv
import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from .. import drawing, figures
from ..compat.logs import say
from ..compat.optional import require
from ..scalars import ScalarsError, read_run
from .checkpoints.work_dir import REPORT
from .checks.decoding import image_decoder
from .processes import on_main

_SCORE = 0.3  # lowest score of a detection that is drawn, as in `polynext-mm predict`
_TILE = 256  # longer side of each picture


class _Picture(NamedTuple):
    """A validation image beside its truth and the prediction, (H, W, 3) uint8 each."""

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    classes: tuple[int, ...]


class _Part(NamedTuple):
    """What one process has seen of a validation.

    Attributes:
        counts: Pixels, (true class, predicted class); None for detectors.
        pictures: By their position in the data set.
        failure: Why something is missing, if it is.
    """

    counts: np.ndarray | None
    pictures: dict[int, _Picture]
    failure: str | None


@HOOKS.register_module()
class ReportHook(Hook):
    """Write curves, a table of the classes and validation pictures into the work dir.

    They are in ``report/``, written after each validation whose checkpoint is the best so far, or
    after each if no best is kept, so that a killed or resumed training has them:

    - ``curves.png``: loss, learning rate and validation, across restarts of the training;
    - ``classes.csv``: IoU, accuracy and pixels of each class, or AP and objects of each class (the
      AP of masks if the model predicts masks), in the units of the log;
    - ``confusion.csv``, ``confusion.png``: for segmentors, how many pixels of each class (a row)
      were predicted to be of each class (a column);
    - ``pictures.png``: images from all over the validation set beside their truth and prediction.

    Everything is taken from the validation itself. If something cannot be written, an error is
    logged, at once and again at the end, and the training continues.

    Args:
        pictures: Number of validation pictures.
    """

    # before metrics are logged; checkpoints are saved before `after_val`
    priority = 'HIGHEST'

    def __init__(self, pictures: int = 8):
        self.pictures = pictures
        self._folder: Path | None = None
        self._tally: _Tally | None = None

    def before_train(self, runner: Runner) -> None:
        self._folder = Path(runner.work_dir) / REPORT
        on_main(lambda: Path(runner.work_dir, REPORT).mkdir(parents=True, exist_ok=True))
        self._failure: str | None = None
        self._classwise = list(_by_class(runner))
        if dist.is_main_process():
            with self._going_on(runner):
                require('matplotlib.figure')

    def before_val_epoch(self, runner: Runner) -> None:
        if self._folder is None:  # not a training
            return
        self._best = _best(runner)
        self._failure = None
        with self._going_on(runner):
            self._tally = _Tally(runner, self.pictures)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        if self._tally is None:
            return
        tally, self._tally = self._tally, None
        with self._going_on(runner):
            tally.add(data_batch, outputs or ())
            self._tally = tally

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self._folder is None:
            return
        precisions = _take_precisions(runner, self._classwise, metrics or {})
        tally, self._tally = self._tally, None
        part = _Part(None, {}, self._failure) if tally is None else tally.part()
        parts = dist.all_gather_object(part)
        if not dist.is_main_process():
            return
        self._failure = next((one.failure for one in parts if one.failure), None)
        counts = [one.counts for one in parts if one.counts is not None]
        pictures = {place: shown for one in parts for place, shown in one.pictures.items()}
        self._seen = (
            sum(counts[1:], counts[0]) if counts else None,
            precisions,
            [pictures[place] for place in sorted(pictures)],
            _in_words(metrics or {}),
        )

    def after_val(self, runner: Runner) -> None:
        if self._folder is None or self._failure or not dist.is_main_process():
            return
        is_best = _best(runner) != self._best or not _keeps_best(runner)
        if is_best or not (self._folder / 'pictures.png').exists():
            with self._going_on(runner):
                self._write(runner, *self._seen)

    def after_train(self, runner: Runner) -> None:
        if self._folder is None or not dist.is_main_process():
            return
        with self._going_on(runner):
            self._write_curves(runner)
        names = sorted(path.name for path in self._folder.iterdir())
        say(f'report: {self._folder}: {", ".join(names) or "nothing"}')
        if self._failure:
            say(f'the report is not complete: {self._failure}', logging.ERROR)

    @contextlib.contextmanager
    def _going_on(self, runner: Runner) -> Iterator[None]:
        """Let a training continue without a part of its report, and say so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a report must never end a training
            self._failure = f'{type(error).__name__}: {error}'
            say(f'the report is not complete: {self._failure}', logging.ERROR)
            runner.logger.info(traceback.format_exc())

    def _write(
        self,
        runner: Runner,
        counts: np.ndarray | None,
        precisions: Mapping[str, float],
        pictures: Sequence[_Picture],
        result: str,
    ) -> None:
        assert self._folder is not None
        dataset = runner.val_dataloader.dataset
        classes, palette = _classes(dataset)
        title = f'iteration {runner.iter}' + (f', {result}' if result else '')
        self._write_curves(runner)
        if counts is not None:
            _write_table(self._folder / 'classes.csv', _of_pixels(classes, counts))
            header = [['truth / predicted', *classes]]
            rows = [[name, *row] for name, row in zip(classes, counts.tolist())]
            _write_table(self._folder / 'confusion.csv', header + rows)
            figures.confusion(counts, classes, title, self._folder / 'confusion.png')
        elif precisions:
            rows = _of_objects(classes, dataset, precisions)
            _write_table(self._folder / 'classes.csv', rows)
        if pictures:
            found = sorted({index for one in pictures for index in one.classes})
            legend = [(classes[index], palette[index]) for index in found]
            rows = [(one.image, one.truth, one.predicted) for one in pictures]
            heads = ('image', 'truth', 'prediction')
            drawing.sheet(rows, heads, title, legend).save(self._folder / 'pictures.png')

    def _write_curves(self, runner: Runner) -> None:
        assert self._folder is not None
        try:
            run = read_run(Path(runner.work_dir))
        except ScalarsError as error:  # a short training, or other vis_backends
            runner.logger.info(f'no curves: {error}')
            return
        figures.curves([run], figures.default_keys([run]), self._folder / 'curves.png')


class _Tally:
    """Counts pixels and keeps pictures of a validation, in one process."""

    def __init__(self, runner: Runner, pictures: int):
        self.dataset = runner.val_dataloader.dataset
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        number = len(self.dataset)
        self.wanted = {round(place) for place in np.linspace(0, number - 1, min(pictures, number))}
        metrics = getattr(runner.val_loop.evaluator, 'metrics', ())
        self.ignored = next((m.ignore_index for m in metrics if hasattr(m, 'ignore_index')), 255)
        self.classes, self.palette = _classes(self.dataset)
        steps = getattr(getattr(self.dataset, 'pipeline', None), 'transforms', ())
        decoder = image_decoder(steps)
        self.is_rgb = decoder is not None and decoder.backend == 'tifffile'
        self.seen = 0
        self.counts: Tensor | None = None
        self.pictures: dict[int, _Picture] = {}

    def part(self) -> _Part:
        counts = None if self.counts is None else self.counts.cpu().numpy()
        return _Part(counts, self.pictures, None)

    def add(self, data_batch: Any, outputs: Iterable[Any]) -> None:
        for index, sample in enumerate(outputs):
            # in mmengine's order of results: the last batches may repeat the first images
            place = self.seen * self.world_size + self.rank
            self.seen += 1
            if place >= len(self.dataset):
                return
            if 'pred_sem_seg' in sample and 'gt_sem_seg' in sample:
                self._count(sample.gt_sem_seg.data, sample.pred_sem_seg.data)
            if place in self.wanted:
                picture = self._picture(place, sample, data_batch['inputs'][index])
                if picture is not None:
                    self.pictures[place] = picture

    def _count(self, truth: Tensor, predicted: Tensor) -> None:
        number = len(self.classes)
        predicted = predicted.flatten().long()
        truth = truth.flatten().to(predicted)
        valid = (truth != self.ignored) & (truth < number) & (predicted < number)
        pairs = truth[valid] * number + predicted[valid]
        counts = torch.bincount(pairs, minlength=number**2).reshape(number, number)
        self.counts = counts if self.counts is None else self.counts + counts

    def _picture(self, place: int, sample: Any, pixels: Tensor) -> _Picture | None:
        """Return a picture of a sample; None if there is no truth to put beside it."""
        height, width = sample.img_shape[:2]
        array = np.moveaxis(pixels.cpu().numpy(), 0, -1)[:height, :width]
        image = drawing.as_shown(array[..., ::-1] if self.is_rgb else array)
        image = drawing.fitted(image, _TILE)
        if 'pred_sem_seg' in sample and 'gt_sem_seg' in sample:
            truth, predicted = (
                drawing.resampled(part.data.squeeze(0).cpu().numpy(), image.shape[:2])
                for part in (sample.gt_sem_seg, sample.pred_sem_seg)
            )
            drawn = (drawing.coloured(image, ids, self.palette, 0.6) for ids in (truth, predicted))
            ids = np.union1d(truth, predicted)
            return _Picture(image, *drawn, tuple(int(i) for i in ids if i < len(self.classes)))
        if 'pred_instances' in sample:
            info = self.dataset.get_data_info(place)
            if info.get('img_path') != sample.img_path:  # the sampler uses another order
                return None
            truth = [one for one in info['instances'] if not one['ignore_flag']]
            found = sample.pred_instances.cpu()
            found = found[found.scores > _SCORE]
            scale = image.shape[1] / sample.ori_shape[1]
            return _Picture(
                image,
                self._boxed(
                    image,
                    np.array([one['bbox'] for one in truth]).reshape(-1, 4) * scale,
                    [one['bbox_label'] for one in truth],
                ),
                self._boxed(
                    image,
                    found.bboxes.float().numpy() * scale,
                    found.labels.tolist(),
                    found.scores.tolist(),
                ),
                (),
            )
        return None

    def _boxed(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: Sequence[int],
        scores: Sequence[float] | None = None,
    ) -> np.ndarray:
        texts = [self.classes[label] for label in labels]
        if scores is not None:
            texts = [f'{text} {score:.2f}' for text, score in zip(texts, scores)]
        colours = [self.palette[label] for label in labels]
        return np.asarray(drawing.boxed(image, boxes, colours, texts))


def _classes(dataset: Any) -> tuple[tuple[str, ...], tuple[drawing.Colour, ...]]:
    metainfo = dataset.metainfo
    classes = tuple(map(str, metainfo['classes']))
    return classes, drawing.colours(metainfo.get('palette'), len(classes))


def _checkpoints(runner: Runner) -> CheckpointHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)


def _keeps_best(runner: Runner) -> bool:
    hook = _checkpoints(runner)
    return hook is not None and bool(hook.save_best)


def _best(runner: Runner) -> Any:
    """Return the path of the best checkpoint by the first metric; a new best has another path."""
    hook = _checkpoints(runner)
    by_metric = getattr(hook, 'best_ckpt_path_dict', None) or {}
    return getattr(hook, 'best_ckpt_path', None) or next(iter(by_metric.values()), None)


def _by_class(runner: Runner) -> Iterator[Any]:
    """Let mmdet's CocoMetric compute AP per class, at no cost; yield the metrics changed."""
    evaluator = getattr(runner.val_loop, 'evaluator', None)
    for metric in getattr(evaluator, 'metrics', ()):
        if type(metric).__name__ == 'CocoMetric' and not metric.classwise:
            metric.classwise = True
            yield metric


def _take_precisions(
    runner: Runner, metrics: Iterable[Any], values: dict[str, float]
) -> dict[str, float]:
    """Remove the AP of each class from the results, which are logged and may select the best."""
    found = {}
    for metric in metrics:
        for name in runner.val_dataloader.dataset.metainfo['classes']:
            value = values.pop(f'{metric.prefix}/{name}_precision', None)
            if value is not None:
                found[str(name)] = float(value)
    return found


def _in_words(metrics: Mapping[str, float]) -> str:
    key = next((key for key in figures.MAIN_METRICS if key in metrics), None)
    return '' if key is None else f'{key} {metrics[key]:.4g}'


def _of_pixels(classes: Sequence[str], counts: np.ndarray) -> list[list]:
    rows: list[list] = [['class', 'IoU', 'Acc', 'pixels']]
    for index, name in enumerate(classes):
        right, truth = counts[index, index], counts[index].sum()
        union = truth + counts[:, index].sum() - right
        rows.append([name, _percent(right, union), _percent(right, truth), int(truth)])
    return rows


def _percent(part: int, whole: int) -> str:
    return f'{100 * part / whole:.2f}' if whole else ''


def _of_objects(classes: Sequence[str], dataset: Any, precisions: Mapping[str, float]) -> list:
    objects = Counter(
        one['bbox_label']
        for index in range(len(dataset))
        for one in dataset.get_data_info(index)['instances']
        if not one['ignore_flag']
    )
    rows: list[list] = [['class', 'AP', 'objects']]
    for index, name in enumerate(classes):
        value = precisions.get(name, float('nan'))
        rows.append([name, '' if np.isnan(value) else f'{value:.3f}', objects[index]])
    return rows


def _write_table(path: Path, rows: Iterable[Iterable]) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(rows)
