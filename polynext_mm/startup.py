"""The first and the last moments of a process of a training, before anything heavy is imported.

A rank ends with its launcher, and a signal that comes before there is anything to save says that
the command is to be started again.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

# sysexits.h's EX_TEMPFAIL: try again later, with --resume
RESUME_ME = 75
# where tools/dist_run.py says which process it is
LAUNCHER = 'POLYNEXT_LAUNCHER'
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


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
    """Until InterruptHook takes over, let SIGTERM end this process with exit code 75."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def leave(number: int, frame: object) -> None:
        if os.getpid() == process:  # not of what was forked from it
            os.write(2, f'SIGTERM before the first iteration: exit code {RESUME_ME}\n'.encode())
        os._exit(RESUME_ME)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
