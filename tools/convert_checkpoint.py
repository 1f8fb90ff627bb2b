"""Translate the names in a checkpoint to ours, or back: ``tools/convert_checkpoint.py IN OUT``."""

import argparse
import sys

from polynext_mm.nn import ARCHS
from polynext_mm.weights import CheckpointError, convert


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Rename the weights of a backbone or a whole model'
    )
    parser.add_argument('source', metavar='IN', help='checkpoint: a path or a url')
    parser.add_argument('target', metavar='OUT', help='file to write (.pt or .pth)')
    parser.add_argument(
        '--to',
        choices=['ours', 'authors'],
        default='ours',
        help='whose names to write (default: %(default)s)',
    )
    parser.add_argument(
        '--arch',
        choices=list(ARCHS),
        metavar='NAME',
        help='arch of the file (default: inferred from its weights)',
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        print('wrote', convert(args.source, args.target, args.to, args.arch, overwrite=args.force))
    except FileExistsError as error:
        sys.exit(f'{error}: use --force to replace it')
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
    main()
