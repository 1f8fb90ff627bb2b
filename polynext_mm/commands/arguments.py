"""Arguments that several commands share; parsing them imports neither torch nor mm."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from polynext_mm.resources import ConfigNotFoundError, find_config

if TYPE_CHECKING:
    from mmengine.config import Config


class UsageError(ValueError):
    """An argument that the user can correct."""


class KeyValues(argparse.Action):
    """Collect settings ``KEY=VALUE`` of a config in a dict, with values read by :func:`setting`."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = dict(getattr(namespace, self.dest, None) or {})
        for text in values:
            key, equals, value = text.partition('=')
            if not equals:
                parser.error(f'{option_string} takes key=value, got {text!r}')
            try:
                found[key] = setting(value)
            except ValueError as error:
                parser.error(f'{option_string} {key}: {error}')
        setattr(namespace, self.dest, found)


_PATHS = ('/', './', '../', '~')


def setting(text: str) -> Any:
    """Parse the value of a setting as mm's tools do: numbers, words, ``a,b``, ``[a,(1,2)]``.

    Paths and quoted text are kept as they are.

    Raises:
        ValueError: If brackets are not closed.
    """
    value = text.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in '\'"':
        return value[1:-1]
    if _is_path(value):
        return value
    if value[:1] + value[-1:] in ('[]', '()') and len(_split(value)) == 1:
        items = [setting(part) for part in _split(value[1:-1])]
        return tuple(items) if value[0] == '(' else items
    if ',' in value:
        return [setting(part) for part in _split(value)]
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    words = {'true': True, 'false': False}
    return None if value == 'None' else words.get(value.lower(), value)


def _is_path(value: str) -> bool:
    """Return whether a value is a single path, not a list of paths or of metrics like coco/mAP."""
    if value.startswith(('[', '(')):
        return os.path.exists(value)
    parts = [part.strip() for part in value.split(',')]
    if value.startswith(_PATHS):
        return len(parts) == 1 or not all(part.startswith(_PATHS) for part in parts)
    if '/' not in parts[0]:
        return len(parts) > 1 and os.path.exists(value)
    return not all('/' in part for part in parts)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes; a trailing comma is allowed."""
    closing = {']': '[', ')': '('}
    parts, inside, quote, part = [], [], '', ''
    for char in text:
        if char == ',' and not inside and not quote:
            parts.append(part)
            part = ''
            continue
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and not part.strip():  # an apostrophe within a word is not a quote
            quote = char
        elif char in '[(':
            inside.append(char)
        elif char in closing and (not inside or inside.pop() != closing[char]):
            raise ValueError(f'brackets are not balanced in {text}')
        part += char
    if inside or quote:
        raise ValueError(f'brackets or quotes are not closed in {text}')
    return [*parts, part] if part.strip() else parts


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
    parser.add_argument(
        'config',
        help='a file, the name of one of `polynext-mm list`, or the work dir of a training',
    )


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
    path = config_path(args)  # fail before imports that take seconds
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
    parser.add_argument(
        '--verbose', action='store_true', help='print all that goes into the log file'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
