"""Arguments that several commands share; parsing them imports neither torch nor mm."""

import argparse


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
