"""Rename the weights in a checkpoint: ``tools/convert_checkpoint.py IN OUT``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:]]))
