"""Say what is wrong with a data set: ``tools/check_dataset.py CONFIG``."""

import sys

from polynext_mm.commands.check_dataset import main

if __name__ == '__main__':
    sys.exit(main())
