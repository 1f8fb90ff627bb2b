"""Export a model for other programs: ``tools/export.py CONFIG CHECKPOINT --out model.onnx``."""

import sys

from polynext_mm.commands.export import main

if __name__ == '__main__':
    sys.exit(main())
