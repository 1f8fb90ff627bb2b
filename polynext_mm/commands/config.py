"""Print a config with all that it inherits, or its path: ``polynext-mm config CONFIG``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from polynext_mm.resources import ConfigNotFoundError, find_config

from .arguments import add_cfg_options, add_config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm config', description='Print a config with all that it inherits'
    )
    add_config(parser)
    parser.add_argument('--path', action='store_true', help='print the path of its file alone')
    add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        path = find_config(args.config)
    except ConfigNotFoundError as error:
        sys.exit(str(error))
    if args.path:
        print(path)
        return 0
    from polynext_mm.engine import launch
    from polynext_mm.engine.checks import config as config_checks

    try:
        print(launch.load_config(path, args.cfg_options).pretty_text)
    except config_checks.ConfigError as error:
        sys.exit(f'{type(error).__name__}: {error}')
    return 0
