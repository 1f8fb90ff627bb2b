"""Export a model for other programs: ``tools/export.py CONFIG CHECKPOINT --out model.onnx``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['export', *sys.argv[1:]]))
