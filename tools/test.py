"""Evaluate a model: ``tools/test.py CONFIG CHECKPOINT``, or ``polynext-mm test``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
