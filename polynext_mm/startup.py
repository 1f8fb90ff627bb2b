"""The start and end of a training process; nothing heavy is imported here.

A rank ends with its launcher. A signal that comes before there is anything to save makes it exit
with the code that asks for a restart. Its output may no longer have a destination by then (the
``tee`` pipe, the terminal, the log's disk), which must not change what the process does.
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


def keep_standard_streams() -> None:
    """Open ``/dev/null`` for each of stdin, stdout and stderr that is closed.

    Otherwise the next file to be opened gets its descriptor, and output to stderr could end up in a
    checkpoint.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


def _settle_standard_streams() -> None:
    """Flush what can be flushed: if Python cannot do that at exit, the exit code becomes 120."""
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

    The exit code of the block is kept even if the output cannot be written.
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
        _settle_standard_streams()
