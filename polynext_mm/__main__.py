"""``python -m polynext_mm COMMAND ...`` is ``polynext-mm COMMAND ...``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main())
