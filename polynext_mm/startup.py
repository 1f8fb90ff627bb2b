"""The start and end of a training process; nothing heavy is imported here.

A rank ends with its launcher. A signal that comes before there is anything to save makes it exit
with the code that asks for a restart. Its output may no longer have a destination by then (the
``tee`` pipe, the terminal, the log's disk), which must not change what the process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# sysexits.h's EX_TEMPFAIL: try again later, with --resume
RESUME_ME = 75
# environment variable in which tools/dist_run.py passes its process id
LAUNCHER = 'POLYNEXT_LAUNCHER'
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def tell(message: str, patience: float = 5.0) -> None:
    """Write a line to stderr, giving up if nobody reads it within ``patience`` seconds.

    This neither raises nor blocks, so that what follows happens in any case.
    """
    with contextlib.suppress(OSError, ValueError):  # closed, without a reader, or on a full disk
        if select.select([], [2], [], patience)[1]:
            os.write(2, f'{message}\n'.encode())


class _Output(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_standard_streams() -> None:
    """Make stdin, stdout and stderr work whatever happened to them.

    ``/dev/null`` is opened for each one that is closed: otherwise the next file to be opened gets
    its descriptor, and output to stderr could end up in a checkpoint. What cannot be printed, since
    the disk is full or nobody reads it, is dropped without an error.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    for name, descriptor in (('stdout', 1), ('stderr', 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f'__{name}__'):  # pytest's or a notebook's
            continue
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        lenient = io.TextIOWrapper(
            io.BufferedWriter(_Output(descriptor, 'w', closefd=False)),
            encoding='utf-8' if stream is None else stream.encoding,
            errors='backslashreplace',
            line_buffering=name == 'stderr' or os.isatty(descriptor),
        )
        setattr(sys, name, lenient)


def end_with_launcher() -> None:
    """Let the system kill this process when the torchrun that started it, if any, ends.

    Raises:
        SystemExit: If torchrun is gone already, which is only detected under tools/dist_run.py.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or sys.platform != 'linux':
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # removed, since child processes have a different parent
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(f'the launcher, process {launcher}, is gone: nothing is started without it')


@contextlib.contextmanager
def resumable_start() -> Iterator[None]:
    """Make SIGTERM end this process with exit code 75 until InterruptHook takes over.

    Standard streams that cannot be written to change nothing, not even the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    keep_standard_streams()
    process = os.getpid()

    def leave(number: int, frame: object) -> None:
        if os.getpid() == process:  # not in forked children
            tell(f'SIGTERM before the first iteration: exit code {RESUME_ME}')
        os._exit(RESUME_ME)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
