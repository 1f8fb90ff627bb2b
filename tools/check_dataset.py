"""Say what is wrong with a data set: ``tools/check_dataset.py CONFIG``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['check-dataset', *sys.argv[1:]]))
