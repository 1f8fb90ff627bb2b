"""Colours over images, boxes in them, and legends below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def coloured(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], opacity: float
) -> np.ndarray:
    """Return an image, (H, W, 3) uint8, with its labels drawn as colours.

    Args:
        labels: (H, W), indices into the palette; pixels with other values are unchanged.
        opacity: Opacity of the colours, from 0 to 1.
    """
    table = np.asarray(palette, np.float32).reshape(-1, 3)
    has_colour = labels < len(table)
    colours = table[np.where(has_colour, labels, 0)]
    mixed = image * np.float32(1 - opacity) + colours * np.float32(opacity)
    return np.where(has_colour[..., None], np.rint(mixed), image).astype(np.uint8)


def boxed(
    image: np.ndarray,
    boxes: np.ndarray,
    colours: Sequence[Colour],
    texts: Sequence[str] | None,
) -> Image.Image:
    """Return an image with boxes, (N, 4) as x1, y1, x2, y2, and texts; the first is on top."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    pen, size = ImageDraw.Draw(picture), _font_size(image)
    font = ImageFont.load_default(size)
    for index in reversed(range(len(boxes))):
        x1, y1, x2, y2 = map(float, boxes[index])
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colours[index], width=size // 8)
        if texts is not None:
            width, height = font.getlength(texts[index]), size * 5 // 4
            left = max(0, min(x1, image.shape[1] - width))
            top = y1 - height if y1 >= height else y1
            pen.rectangle((left, top, left + width, top + height), fill=colours[index])
            dark = sum(colours[index]) < 3 * 128
            pen.text((left, top), texts[index], 'white' if dark else 'black', font)
    return picture


def _font_size(image: np.ndarray) -> int:
    return max(11, min(image.shape[:2]) // 40)


def with_legend(image: np.ndarray, entries: Sequence[tuple[str, Colour]]) -> np.ndarray:
    """Return an image with a legend of colours below.

    Args:
        image: (H, W, 3) uint8 in RGB.
        entries: Names, and colours as (R, G, B).

    Returns:
        The image, of the same width, or at least as wide as the longest name needs.
    """
    size = _font_size(image)
    font, gap = ImageFont.load_default(size), size // 2
    widths = [2 * size + gap + int(font.getlength(name)) for name, _ in entries]
    total = max([image.shape[1], *widths])
    rows: list[list[tuple[int, tuple[str, Colour]]]] = []
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
