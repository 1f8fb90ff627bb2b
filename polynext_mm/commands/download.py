"""Download published files once, also for a machine without a network: ``polynext-mm download``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm download',
        description='Download published files to where configs look for them, and print their '
        'paths. Files that are there already are not downloaded again',
        epilog='example: %(prog)s cpolynext_s. For a machine without a network, copy the file to '
        'the path that `polynext-mm list files` shows there',
    )
    parser.add_argument(
        'names', nargs='+', metavar='NAME', help='such as cpolynext_s, of `polynext-mm list files`'
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from polynext_mm.weights import CheckpointError
    from polynext_mm.weights.downloads import PUBLISHED_SCHEME, local_path

    for name in args.names:
        try:
            print(local_path(PUBLISHED_SCHEME + name.removeprefix(PUBLISHED_SCHEME)))
        except CheckpointError as error:
            sys.exit(f'{type(error).__name__}: {error}')
    return 0
