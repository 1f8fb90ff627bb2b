"""Print a config with all that it inherits, or its path: ``polynext-mm config CONFIG``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import add_cfg_options, add_config, config_path, read_config


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
    print(config_path(args) if args.path else read_config(args).pretty_text)
    return 0
