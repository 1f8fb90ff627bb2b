"""Train a segmentor or a detector: ``tools/train.py CONFIG``, or ``polynext-mm train``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
