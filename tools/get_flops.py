"""Count parameters and multiply-adds: ``tools/get_flops.py CONFIG``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['flops', *sys.argv[1:]]))
