"""Translate the names in a checkpoint to ours, or back: ``polynext-mm convert IN OUT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm.written import OverwriteError, require_apart


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm convert', description='Rename the weights of a backbone or a whole model'
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
        '--arch', metavar='NAME', help='arch of the file (default: inferred from its weights)'
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    from polynext_mm.nn import ARCHS
    from polynext_mm.weights import CheckpointError, convert

    if args.arch is not None and args.arch not in ARCHS:
        parser.error(f'argument --arch: {args.arch!r} is not one of {", ".join(ARCHS)}')
    try:
        require_apart([('OUT', Path(args.target))], [args.source])
        print('wrote', convert(args.source, args.target, args.to, args.arch, overwrite=args.force))
    except OverwriteError as error:
        sys.exit(str(error))
    except FileExistsError as error:
        sys.exit(f'{error}: use --force to replace it')
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    return 0
