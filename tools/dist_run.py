"""torchrun whose ranks always end with it, even while they start: see dist_train.sh.

Its exit code is 75, "resume me", where a signal ended the run.
"""

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# as of polynext_mm.startup, which need not be importable here
RESUME_ME = 75
LAUNCHER = 'POLYNEXT_LAUNCHER'


def main() -> None:
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        run.main()
    except SignalException as error:
        if error.sigval is signal.SIGQUIT:  # which ends the ranks at once
            raise
        sys.exit(RESUME_ME)
    except ChildFailedError as error:
        if any(failure.exitcode == RESUME_ME for failure in error.failures.values()):
            sys.exit(RESUME_ME)
        raise


if __name__ == '__main__':
    main()
