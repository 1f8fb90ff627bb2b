"""Decode files as the pipeline of a data set does, and find what that does to them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
from PIL import Image

_ORIENTATION = 274  # the tag of EXIF and TIFF
_BITS = 258  # the tag of TIFF: bits per sample
_TURNING = ('color', 'grayscale')  # flags with which mmcv obeys EXIF
_BITS_OF_MODES = {'I': 32, 'F': 32}


class Decoder(NamedTuple):
    """The arguments that ``mmcv.imfrombytes`` is called with.

    Attributes:
        flag: ``color_type`` of mm's LoadImageFromFile; labels are read 'unchanged'.
        backend: ``imdecode_backend``.
    """

    flag: str = 'color'
    backend: str = 'cv2'

    def decode(self, content: bytes) -> np.ndarray | None:
        """Return the pixels, (H, W) or (H, W, C); None where OpenCV can decode nothing.

        Raises:
            Exception: Whatever another backend raises.
        """
        return mmcv.imfrombytes(content, flag=self.flag, backend=self.backend)

    def picture(self, content: bytes) -> Image.Image:
        """Return the decoded image as a picture to look at; of many channels, the first three."""
        pixels = self.decode(content)
        if pixels.ndim == 3:
            pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
            if pixels.ndim == 3 and self.backend != 'tifffile':
                pixels = pixels[..., ::-1]  # mmcv gives BGR
        if pixels.dtype != np.uint8:
            pixels = np.nan_to_num(pixels.astype(np.float32))
            low, high = pixels.min(), pixels.max()
            pixels = ((pixels - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(pixels)).convert('RGB')


LABELS = Decoder('unchanged', 'pillow')  # mmseg's LoadAnnotations by default


class Header(NamedTuple):
    """What the header of a file says.

    Attributes:
        size: Width and height as the decoder returns them.
        stored: Width and height of the pixels as stored.
        orientation: EXIF orientation if the decoder obeys it, else 1, which is upright.
        mode: Pillow's name for the mode, with the bits per sample if there are more than 8.
        bits: Bits per sample.
        format: Pillow's name for the format.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int
    mode: str
    bits: int
    format: str

    @property
    def may_be_turned(self) -> bool:
        """Whether EXIF turns or mirrors the picture without changing its size."""
        return self.orientation != 1 and self.size == self.stored


def read_header(content: bytes, decoder: Decoder) -> Header:
    """Read the header of a file.

    Raises:
        OSError: If Pillow does not know the format. Also ValueError and SyntaxError.
    """
    with Image.open(io.BytesIO(content)) as image:
        bits = _BITS_OF_MODES.get(image.mode, 16 if image.mode.startswith('I;16') else 8)
        if image.format == 'PNG':
            bits = content[24]
        elif image.format in ('TIFF', 'MPO'):
            bits = max(getattr(image, 'tag_v2', {}).get(_BITS, (bits,)))
        size = image.size
        orientation = _orientation(image, content, decoder)
        turned = size[::-1] if orientation >= 5 else size
        mode = f'{image.mode}, {bits} bits' if bits > 8 and image.mode.isalpha() else image.mode
        return Header(turned, size, orientation, mode, bits, image.format)


def _orientation(image: Image.Image, content: bytes, decoder: Decoder) -> int:
    obeyed = ('JPEG', 'MPO', 'PNG') if decoder.backend == 'cv2' else ('JPEG', 'MPO', 'PNG', 'WEBP')
    if (
        decoder.flag not in _TURNING
        or decoder.backend not in ('cv2', 'pillow')
        or image.format not in obeyed  # all decoders rotate TIFF, and report the rotated size
        # Pillow would decode a whole PNG to find the EXIF data
        or (image.format == 'PNG' and b'eXIf' not in content)
    ):
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def is_turned_by_exif(path: str | os.PathLike, size: tuple[int, int]) -> bool:
    """Return whether ``size`` is that of a decoder that swapped width and height due to EXIF.

    Decoders differ: OpenCV does not obey EXIF in WebP, for example.
    """
    with Image.open(path) as image:
        turns = image.format != 'TIFF' and image.getexif().get(_ORIENTATION, 1) >= 5
        return turns and image.size == tuple(size)[::-1]


def allow_large_images() -> None:
    """Lift Pillow's limit of 179 megapixels, which is meant for untrusted files."""
    Image.MAX_IMAGE_PIXELS = None


def image_decoder(steps: Iterable[Any]) -> Decoder | None:
    """Return how a pipeline decodes images; None if not with mm's LoadImageFromFile."""
    return _decoder(steps, 'LoadImageFromFile', 'color', 'cv2')


def label_decoder(steps: Iterable[Any]) -> Decoder:
    """Return how a pipeline decodes label images."""
    return _decoder(steps, 'LoadAnnotations', *LABELS) or LABELS


def _decoder(steps: Iterable[Any], name: str, flag: str, backend: str) -> Decoder | None:
    for step in steps:
        options = step if isinstance(step, Mapping) else vars(step)
        kind = step.get('type') if isinstance(step, Mapping) else type(step)
        if str(getattr(kind, '__name__', kind)).split('.')[-1] == name:
            # with None, mm uses the process-wide default
            backend = options.get('imdecode_backend', backend) or mmcv.image.io.imread_backend
            return Decoder(options.get('color_type', flag), backend)
    return None


def count_ids(label: np.ndarray) -> dict[int, int]:
    """Return how many pixels each value of a label image has."""
    if label.dtype == np.uint8:
        # cv2 counts ten times as fast as numpy
        counts = cv2.calcHist([np.ascontiguousarray(label)], [0], None, [256], [0, 256]).ravel()
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(label.astype(np.int64), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))
