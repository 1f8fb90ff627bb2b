"""Read a data set once and say what is wrong with it: ``polynext-mm check-dataset CONFIG``.

The exit code is 1 if training or evaluation would fail or go silently wrong, else 0.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_cfg_options, add_config, not_negative


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm check-dataset',
        description='Check the data sets of a config',
        epilog='example: %(prog)s my_roofs.py --fix-hints',
    )
    add_config(parser)
    parser.add_argument(
        '--fix-hints', action='store_true', help='say what to do about each finding'
    )
    parser.add_argument(
        '--workers',
        type=not_negative,
        default=os.cpu_count(),
        help='threads that read (default: one for each core)',
    )
    parser.add_argument(
        '--pictures',
        default='work_dirs/check_dataset',
        help='folder for pictures of some samples with their labels (default: %(default)s)',
    )
    parser.add_argument(
        '--samples',
        type=not_negative,
        default=4,
        help='pictures of each split (default: %(default)s)',
    )
    add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from polynext_mm.datasets import DataError, Finding
    from polynext_mm.engine import launch
    from polynext_mm.engine.checks import config as config_checks
    from polynext_mm.engine.checks.findings import listed
    from polynext_mm.written import OverwriteError

    from . import dataset_report as report

    try:
        cfg = launch.load_config(args.config, args.cfg_options)
        wrong = list(config_checks.palette_problems(cfg))
        if wrong:  # mmseg cannot build such a data set
            raise config_checks.ConfigError('\n  '.join(wrong))
        problems = list(config_checks.class_problems(cfg))
        splits = list(report.splits_of(cfg))
        report.require_pictures_apart(splits, Path(args.pictures), args.samples)
        for split in splits:
            report.read(split, args.workers)
    except (FileNotFoundError, DataError, OverwriteError, config_checks.ConfigError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    pictures = []
    findings = [('', Finding(problem, 'the line says what to set')) for problem in problems]
    findings += [('', finding) for finding in report.of_config(cfg)]
    findings += [('', finding) for finding in report.shared(splits)]
    for split in splits:
        print('\n' + '\n'.join(report.table(split)))
        pictures += report.draw(split, Path(args.pictures), args.samples)
        findings += [(f'{split.place}: ', finding) for finding in split.findings]
    print()
    if pictures:
        print(f'pictures: {listed(pictures)}')
    for place, finding in sorted(findings, key=lambda found: not found[1].serious):
        named = '' if finding.what.startswith(place) else place
        print(f'{"ERROR" if finding.serious else "note "}  {named}{finding.what}')
        if args.fix_hints:
            print(f'       -> {finding.remedy}')
    serious = sum(finding.serious for _, finding in findings)
    hint = '' if args.fix_hints or not findings else ' (--fix-hints says what to do)'
    print(f'{serious} errors, {len(findings) - serious} notes{hint}')
    return 1 if serious else 0
