"""Draw colours over images, boxes in them and legends below, and lay out sheets of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Return an image with boxes, (N, 4) as x1, y1, x2, y2, and texts, the first box on top."""
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
    """Return an image with a legend of colours below it.

    Args:
        image: (H, W, 3) uint8 in RGB.
        entries: Names, and colours as (R, G, B).

    Returns:
        The image, of the same width, or wider if the longest name needs it.
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


def colours(palette: Any, count: int) -> tuple[Colour, ...]:
    """Return ``count`` colours: those of a palette, then generated ones.

    Args:
        palette: A list of (R, G, B), a name that mmdet knows, or None.
        count: Number of classes.
    """
    if isinstance(palette, str):
        from mmdet.visualization import get_palette

        palette = get_palette(palette, count)
    own = [tuple(int(value) for value in colour) for colour in palette or ()][:count]
    others = np.random.RandomState(42).randint(0, 256, (count, 3)).tolist()
    return tuple(own + [tuple(colour) for colour in others[len(own) :]])


def as_shown(image: np.ndarray) -> np.ndarray:
    """Return what a pipeline has read, (H, W) or (H, W, C) in BGR, as (H, W, 3) uint8 in RGB."""
    image = image if image.ndim == 3 else image[..., None]
    image = image[..., 2::-1] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1)
    if image.dtype != np.uint8:
        largest = float(image.max()) if image.size else 0.0
        scale = 255 / largest if largest > 255 else 1.0
        image = np.clip(image * scale, 0, 255).astype(np.uint8)
    return image.copy()


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image, (H, W, 3) uint8, whose longer side is ``side``."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, kind))


def resampled(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return labels, (H, W), resized by nearest neighbour to a height and width."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, labels.shape))
    return labels[rows][:, columns]


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    heads: Sequence[str],
    title: str,
    legend: Sequence[tuple[str, Colour]],
) -> Image.Image:
    """Return a sheet of images, two rows side by side.

    Args:
        rows: Images, (H, W, 3) uint8; those in a row have the same size.
        heads: Headings of the columns.
        title: Heading of the sheet.
        legend: Names, and colours as (R, G, B).
    """
    gap, line = 4, 20
    font = ImageFont.load_default(14)
    halves = min(2, len(rows))
    lines = [rows[start : start + halves] for start in range(0, len(rows), halves)]
    width = max(image.shape[1] for row in rows for image in row) + gap
    heights = [max(row[0].shape[0] for row in pair) + gap for pair in lines]
    canvas = Image.new('RGB', (halves * len(heads) * width, 2 * line + sum(heights)), 'white')
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 0), title, 'black', font)
    top = 2 * line
    for pair, height in zip(lines, heights):
        for place, image in enumerate(image for row in pair for image in row):
            canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (place * width, top))
        top += height
    for place in range(halves * len(heads)):
        pen.text((place * width + gap, line), heads[place % len(heads)], 'black', font)
    return Image.fromarray(with_legend(np.asarray(canvas), legend)) if legend else canvas
