"""Arguments that several commands share; parsing them imports neither torch nor mm."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from polynext_mm.resources import ConfigNotFoundError, find_config

if TYPE_CHECKING:
    from mmengine.config import Config


class UsageError(ValueError):
    """An argument that the user can correct."""


class KeyValues(argparse.Action):
    """mmengine's ``DictAction``, imported when the option is used."""

    def __call__(self, parser, namespace, values, option_string=None):
        from mmengine.config import DictAction

        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value, got {value!r}')
        try:
            DictAction(self.option_strings, self.dest)(parser, namespace, values, option_string)
        except AssertionError as error:  # how mmengine tells brackets that are not closed
            parser.error(f'{option_string}: {error}')


def positive(text: str) -> int:
    """Convert to an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def not_negative(text: str) -> int:
    """Convert to an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not an integer of at least 0')
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Convert HEIGHTxWIDTH."""
    height, _, width = text.partition('x')
    try:
        return positive(height), positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 512x512') from None


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config: a file, or the name of one of `polynext-mm list`')


def add_cfg_options(parser: argparse.ArgumentParser, more: str = '') -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        metavar='KEY=VALUE',
        help=f'settings of the config to override{more}',
    )


def config_path(args: argparse.Namespace) -> str:
    """Return the path of the config that a command line names.

    Raises:
        SystemExit: If there is none, with a line that says so.
    """
    try:
        return find_config(args.config)
    except ConfigNotFoundError as error:
        sys.exit(f'{type(error).__name__}: {error}')


def read_config(args: argparse.Namespace) -> Config:
    """Return the config that a command line names, with its ``--cfg-options``.

    Raises:
        SystemExit: If there is none, or an option cannot work, with a line that says so.
    """
    path = config_path(args)  # before what takes seconds to import
    from polynext_mm.engine import launch
    from polynext_mm.engine.checks.config import ConfigError

    try:
        return launch.load_config(path, args.cfg_options)
    except ConfigError as error:
        sys.exit(f'{type(error).__name__}: {error}')


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and evaluation share."""
    parser.add_argument('--work-dir', help='for logs and results (default: work_dirs/CONFIG)')
    add_cfg_options(parser, '; data_root=FOLDER moves the data set')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument(
        '--unchecked',
        action='store_true',
        help='do not check config, data and checkpoint before the first step',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
