"""The outputs of `polynext-mm predict`: pictures, videos, label maps and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from polynext_mm.compat.logs import LIVE, bar
from polynext_mm.engine.checks.findings import DataError, file_fault
from polynext_mm.inference import Detections, Predictor, Segmentation
from polynext_mm.inference.predictor import Loaded
from polynext_mm.inference.results import categories

from .arguments import UsageError
from .predict_inputs import Clip, Picture, frame_count, frames, frames_per_second


class VideoFile:
    """A video file, opened with the size of its first frame.

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
        frame = np.ascontiguousarray(image[..., ::-1])
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
        predictor: The model's predictor.
        args: Arguments of the command line.
        stems: Names of the label maps in their folder, by input.
    """

    def __init__(
        self,
        predictor: Predictor,
        args: argparse.Namespace,
        stems: Mapping[Picture | Clip, str],
    ):
        self.predictor = predictor
        self.labels: Path | None = args.labels
        self.json: Path | None = args.json
        self.opacity: float = args.opacity
        self.legend: bool = args.legend
        self.max_frames: int | None = args.max_frames
        self.stems = stems
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.found = self.seen = 0
        self.best_left_out: float | None = None

    def write(self, inputs: Sequence[Picture | Clip]) -> list[str]:
        """Draw and write everything; return the errors of inputs that cannot be read."""
        Image.MAX_IMAGE_PIXELS = None  # large pictures are allowed here
        broken = self._write_pictures([one for one in inputs if isinstance(one, Picture)])
        for clip in inputs:
            if isinstance(clip, Clip):
                try:
                    self._write_clip(clip)
                except UsageError as error:
                    broken.append(str(error))
        return broken

    def _write_pictures(self, pictures: Sequence[Picture]) -> list[str]:
        broken: list[str] = []
        readable: list[Picture] = []
        bar = Progress(len(pictures) if len(pictures) > 1 else None)

        def load() -> Iterator[Loaded]:
            for picture in pictures:
                try:
                    if not picture.path.is_file():  # reading a pipe would block
                        raise DataError(file_fault(picture.path).what)
                    loaded = self.predictor.load(picture.path)
                    # OpenCV reads truncated files in part
                    fault = file_fault(picture.path) if _pillow_reads(picture.path) else None
                    if fault is not None:
                        raise DataError(fault.what)
                except DataError as error:
                    broken.append(str(error))
                    bar.advance()
                    continue
                readable.append(picture)
                yield loaded

        for index, result in enumerate(self.predictor.predict(load())):
            picture = readable[index]
            result.save(picture.target, self.opacity, self.legend)
            self._note(result, str(picture.path), self.stems[picture])
            bar.advance()
            if len(pictures) == 1:
                print(picture.target)
        bar.close()
        written = len(pictures) - len(broken)
        if len(pictures) > 1 and written:
            folders = sorted({str(picture.target.parent) for picture in pictures})
            print(f'wrote {written} pictures to {", ".join(folders)}')
        return broken

    def _write_clip(self, clip: Clip) -> None:
        """Draw and write a video, or the frames of a camera until Ctrl-C.

        Raises:
            UsageError: If it cannot be opened, or has no frames.
        """
        capture = clip.open()
        count = frame_count(capture)
        total = min(filter(None, (count, self.max_frames)), default=None)
        if not count:
            print(f'recording {clip.name} to {clip.target}; Ctrl-C ends', file=sys.stderr)
        images = islice(frames(capture), self.max_frames)
        first = next(images, None)
        if first is None:
            raise UsageError(f'{clip.source} has no frames')
        clip.target.parent.mkdir(parents=True, exist_ok=True)
        video, bar = VideoFile(clip.target, frames_per_second(capture)), Progress(total)
        try:
            for index, result in enumerate(self.predictor(chain([first], images), 'bgr')):
                video.write(np.asarray(result.draw(self.opacity, self.legend)))
                self._note(result, f'{clip.name}_{index:06}', f'{self.stems[clip]}_{index:06}')
                bar.advance()
        except KeyboardInterrupt:  # the way to stop a camera
            print('ended by Ctrl-C', file=sys.stderr)
        finally:
            video.close()
        bar.close()
        print(clip.target)

    def _note(self, result: Segmentation | Detections, name: str, stem: str) -> None:
        """Write the label map of an image, and keep its results for the JSON file."""
        self.seen += 1
        height, width = result.image.shape[:2]
        entry = dict(id=len(self.images), file_name=name, width=width, height=height)
        self.images.append(entry)
        if isinstance(result, Detections):
            self.found += len(result)
            if result.best_left_out is not None:
                self.best_left_out = max(self.best_left_out or 0.0, result.best_left_out)
            if self.json is not None:
                self.annotations += result.annotations(entry['id'], len(self.annotations) + 1)
            return
        if self.labels is not None:
            result.save_labels(self.labels / f'{stem}.png')
        entry['shares'] = {key: round(share, 6) for key, share in result.shares.items()}

    def finish(self) -> None:
        """Write the JSON file, if requested, and print how much was found."""
        if self.predictor.detects and self.seen:
            self._count()
        if self.json is None:
            return
        first = 1 if self.predictor.detects else 0  # label maps count from 0
        content = dict(images=self.images, categories=categories(self.predictor.classes, first))
        if self.predictor.detects:
            content['annotations'] = self.annotations
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(content))
        print(self.json)

    def _count(self) -> None:
        boxes = '1 box' if self.found == 1 else f'{self.found} boxes'
        images = '1 image' if self.seen == 1 else f'{self.seen} images'
        print(f'found {boxes} in {images}')
        if self.found < self.seen and self.best_left_out is not None:
            print(
                f'scores up to {self.predictor.score_thr} are left out, the best of them '
                f'{self.best_left_out:.2f}: a lower --score-thr shows more',
                file=sys.stderr,
            )


def _pillow_reads(path: Path) -> bool:
    """Return whether Pillow knows the format; only the pipeline's decoder can check others."""
    try:
        with Image.open(path):
            return True
    except OSError:
        return False


class Progress:
    """Shows in a terminal how many inputs are done; does nothing without one."""

    def __init__(self, total: int | None):
        self.total, self.done = total, 0

    def advance(self) -> None:
        self.done += 1
        if self.total:
            LIVE.show(f'{bar(self.done, self.total)} {self.done}/{self.total}')

    def close(self) -> None:
        LIVE.clear()
