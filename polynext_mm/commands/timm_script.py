"""Run a script on top of timm that can create a PolyNeXt: ``polynext-mm timm SCRIPT ARGS...``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from .run import build_parser as build_script_parser
from .run import run_script


def build_parser():
    return build_script_parser('timm')


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    importlib.import_module('polynext_mm.timm')
    return run_script(args.script, args.arguments)
