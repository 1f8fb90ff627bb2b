"""Run a script with polynext_mm imported first: ``polynext-mm run SCRIPT ARGS...``.

It is for scripts of other projects, such as mmdet's tools/test.py, that import mmcv's operators
before they read a config, if mmcv has no compiled ones.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm.compat import check_stack


def build_parser(command: str = 'run') -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f'polynext-mm {command}', description='Run a script with PolyNeXt registered'
    )
    parser.add_argument('script', type=Path, help='the script')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='what it gets as arguments')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_stack()
    return run_script(args.script, args.arguments)


def run_script(script: Path, arguments: Sequence[str]) -> int:
    """Run a script as ``python SCRIPT ARGUMENTS...`` does, in this process."""
    if not script.is_file():
        sys.exit(f'there is no script {script}')
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` sets it
    runpy.run_path(str(script), run_name='__main__')
    return 0
