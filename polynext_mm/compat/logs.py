"""Print lines on a quiet console, and suppress what mm prints that nobody needs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TextIO

# mm's messages about itself, on which no user can act
NOISE = (
    'The prefix is not set in metric class',
    'will be deprecated in future',
    'does not match exactly',
    'Could not import OneDL',
    'Loads checkpoint by ',  # we say what was loaded
    # pycocotools
    'loading annotations into memory',
    'Done (t=',
    'creating index',
    'index created',
)


def say(text: str, level: int = logging.INFO) -> None:
    """Log a line that users should see, in mmengine's current logger."""
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().log(level, text, extra={'console': True})


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Pass on what is printed within, except what mm prints when imported."""
    if sys.stdout is None:  # closed
        yield
        return
    filtered = _Filtered(sys.stdout)
    try:
        with contextlib.redirect_stdout(filtered):  # type: ignore[type-var]
            yield
    finally:
        filtered.finish()


class _Filtered:
    """A stream that leaves out mm's lines; a log handler that is created within may keep it."""

    def __init__(self, stream: TextIO):
        self._stream, self._line = stream, ''

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split('\n')
        for line in lines:
            if not any(noise in line for noise in NOISE):
                self._stream.write(f'{line}\n')
        return len(text)

    def finish(self) -> None:
        self._stream.write(self._line)
        self._line = ''

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def import_quietly(name: str) -> ModuleType:
    """Import a module of mm without printing its messages about what it lacks."""
    if name in sys.modules:
        return sys.modules[name]
    with without_noise():
        return importlib.import_module(name)


class LiveLine:
    """A line at the bottom of a terminal that is rewritten in place; does nothing elsewhere."""

    _PAUSE = 0.1  # seconds

    def __init__(self) -> None:
        self._shown = False
        self._last = 0.0

    def show(self, text: str) -> None:
        """Replace the line, unless it was replaced just now."""
        now = time.monotonic()
        if now - self._last < self._PAUSE or not _is_terminal():
            return
        self._last, self._shown = now, True
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f'\r{text[:width]}\033[K')
        sys.stdout.flush()

    def clear(self) -> None:
        """Erase the line, before others are printed."""
        if self._shown:
            sys.stdout.write('\r\033[K')
            sys.stdout.flush()
            self._shown = False


#: The live line of this process.
LIVE = LiveLine()


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'


def bar(done: int, total: int, width: int = 20) -> str:
    """Return a text progress bar."""
    full = width * done // max(total, 1)
    return f'[{"=" * full}{" " * (width - full)}]'
