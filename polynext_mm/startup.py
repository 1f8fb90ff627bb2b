"""The first and the last moments of a process of a training, before anything heavy is imported.

A rank ends with its launcher, and a signal that comes before there is anything to save says that
the command is to be started again. Whoever reads what the process prints may be gone by then (the
pipe of ``tee``, the terminal, the disk of the log), which changes nothing about what it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

# sysexits.h's EX_TEMPFAIL: try again later, with --resume
RESUME_ME = 75
# where tools/dist_run.py says which process it is
LAUNCHER = 'POLYNEXT_LAUNCHER'
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def tell(message: str, patience: float = 5.0) -> None:
    """Write a line to stderr, unless nobody takes it within ``patience`` seconds.

    It neither raises nor blocks, so that what it announces happens in any case.
    """
    with contextlib.suppress(OSError, ValueError):  # closed, its reader gone, its disk full
        if select.select([], [2], [], patience)[1]:
            os.write(2, f'{message}\n'.encode())


def keep_standard_streams() -> None:
    """Open ``/dev/null`` for each of stdin, stdout and stderr that is closed.

    Otherwise the next file to be opened gets its number, and what is written to stderr ends up in
    a checkpoint.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _settle_standard_streams() -> None:
    """Flush what can be flushed: Python exits with code 120 if it cannot do that at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def end_with_launcher() -> None:
    """Let the system kill this process when torchrun, if that started it, is no longer there.

    Raises:
        SystemExit: If it is gone already, which only tools/dist_run.py makes known.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or sys.platform != 'linux':
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # taken out: what this process starts has another parent
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(f'the launcher, process {launcher}, is gone: nothing is started without it')


@contextlib.contextmanager
def resumable_start() -> Iterator[None]:
    """Until InterruptHook takes over, let SIGTERM end this process with exit code 75.

    The exit code of what runs inside is kept even if nobody reads what was printed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    keep_standard_streams()
    process = os.getpid()

    def leave(number: int, frame: object) -> None:
        if os.getpid() == process:  # not of what was forked from it
            tell(f'SIGTERM before the first iteration: exit code {RESUME_ME}')
        os._exit(RESUME_ME)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _settle_standard_streams()
