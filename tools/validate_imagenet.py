"""Accuracy on ImageNet, and robustness: ``tools/validate_imagenet.py MODEL --imagenet FOLDER``."""

import sys

from polynext_mm.commands import main

if __name__ == '__main__':
    sys.exit(main(['validate-imagenet', *sys.argv[1:]]))
