"""The inputs of `polynext-mm predict`: pictures, and clips (videos and cameras)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import UsageError

if TYPE_CHECKING:
    import cv2
    import numpy as np

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpg', '.webm', '.wmv')
# for cameras that do not report one
_FRAMES_PER_SECOND = 25
_OUT = Path('predictions')


@dataclass(frozen=True)
class Picture:
    """An image to read, and a file to write it to."""

    path: Path
    target: Path

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Clip:
    """A video or a camera, and a file to write it to.

    Args:
        source: Path of the video, or number of the camera.
        target: The file.
    """

    source: str | int
    target: Path

    @property
    def name(self) -> str:
        return f'camera{self.source}' if isinstance(self.source, int) else Path(self.source).stem

    def open(self) -> cv2.VideoCapture:
        """Open it with OpenCV.

        Raises:
            UsageError: If there is no such camera, or the video cannot be read.
        """
        import cv2

        capture = cv2.VideoCapture(self.source)
        if not capture.isOpened():
            what = 'camera' if isinstance(self.source, int) else 'video that OpenCV can read at'
            raise UsageError(f'there is no {what} {self.source}')
        return capture


def frames_per_second(capture: cv2.VideoCapture) -> float:
    import cv2

    return capture.get(cv2.CAP_PROP_FPS) or _FRAMES_PER_SECOND


def frame_count(capture: cv2.VideoCapture) -> int:
    """Return how many frames a video claims to have; 0 for a camera."""
    import cv2

    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield frames, (H, W, 3) uint8 in BGR, until there are no more."""
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield frame
    finally:
        capture.release()


def find_inputs(inputs: Sequence[str], out: Path | None) -> list[Picture | Clip]:
    """Return what the arguments name, with the files to write.

    Args:
        inputs: Images, folders, patterns, videos or numbers of cameras.
        out: File for a single image, video or camera, else folder; None for ``predictions/``.

    Raises:
        UsageError: If something does not exist, or ``out`` is not the kind of file to write.
    """
    if len(inputs) == 1:
        return _find_one(inputs[0], out)
    folder, found = out or _OUT, []
    for argument in inputs:
        found += _find_one(argument, folder, several=True)
    return found


def _find_one(argument: str, out: Path | None, several: bool = False) -> list[Picture | Clip]:
    path = Path(argument)
    if path.is_dir():
        return _in_folder(path, out, several)
    if glob.has_magic(argument) and not path.is_file():
        return _matching(argument, out or _OUT)
    if argument.isdecimal() and not path.exists():
        clip = Clip(int(argument), _OUT / f'camera{argument}.mp4')
        return [_clip_to(clip, out, several)]
    if not path.is_file():
        raise UsageError(f'there is no image {path}')
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return [_clip_to(Clip(str(path), _OUT / f'{path.stem}.mp4'), out, several)]
    if several:
        return [Picture(path, out / path.name)]
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UsageError(f'--out must end in one of {", ".join(SUFFIXES)}, got {out}')
    return [Picture(path, out or _OUT / path.name)]


def _in_folder(path: Path, out: Path | None, several: bool) -> list[Picture]:
    found = sorted(image for image in path.iterdir() if image.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f'no image ({", ".join(SUFFIXES)}) in {path}')
    name = path.resolve().name
    folder = out / name if several else out or _OUT / name
    return [Picture(image, folder / image.name) for image in found]


def _matching(pattern: str, folder: Path) -> list[Picture | Clip]:
    paths = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    if not images and not videos:
        raise UsageError(f'no image or video matches {pattern}')
    # keep apart several folders that the pattern matches
    folders = {path: path.parent.resolve() for path in images + videos}
    top = Path(os.path.commonpath(folders.values()))
    below = {path: folder / in_it.relative_to(top) / path.name for path, in_it in folders.items()}
    return [
        *(Picture(path, below[path]) for path in images),
        *(Clip(str(path), below[path].with_suffix('.mp4')) for path in videos),
    ]


def _clip_to(clip: Clip, out: Path | None, several: bool) -> Clip:
    if several:
        return Clip(clip.source, out / clip.target.name)
    if out is not None and out.suffix.lower() not in VIDEO_SUFFIXES:
        raise UsageError(f'--out must end in one of {", ".join(VIDEO_SUFFIXES)}, got {out}')
    return Clip(clip.source, out or clip.target)


def sources(found: Sequence[Picture | Clip]) -> list[Path]:
    """Return the files that are read, except cameras."""
    paths = (one.path if isinstance(one, Picture) else one.source for one in found)
    return [Path(path) for path in paths if not isinstance(path, int)]


def label_stems(found: Sequence[Picture | Clip]) -> dict[Picture | Clip, str]:
    """Return the names of the label maps: those of the inputs, without suffix."""
    if len(found) == 1:
        return {found[0]: found[0].name}
    top = os.path.commonpath([one.target.parent for one in found])
    return {one: str(one.target.relative_to(top).with_suffix('')) for one in found}
