"""Draw predictions: ``tools/image_demo.py IMAGE CONFIG CHECKPOINT``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['predict', *sys.argv[1:]]))
