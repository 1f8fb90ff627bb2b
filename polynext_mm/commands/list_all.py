"""List archs, configs and published files: ``polynext-mm list [WHAT] [WORD ...]``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from polynext_mm.resources import config_names, folder


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm list',
        description='List archs, configs and published files, or those rows with all the words',
        epilog='for example: polynext-mm list configs mask apolynext',
    )
    parser.add_argument(
        'words',
        nargs='*',
        metavar='archs|configs|files|WORD',
        help='what to list (default: all), and words that a row must contain',
    )
    parser.add_argument('--names', action='store_true', help='print names alone, for scripts')
    return parser


def archs() -> list[list[str]]:
    from polynext_mm.nn import ARCHS

    return [
        ['arch', 'widths', 'depths', 'mixers'],
        *(
            [name, _joined(arch.widths), _joined(arch.depths), _joined(arch.mixers)]
            for name, arch in ARCHS.items()
        ),
    ]


def configs() -> list[list[str]]:
    """Return the tables of configs/README.md as one, plus the configs that are in none."""
    lines = (folder('configs') / 'README.md').read_text(encoding='utf-8').splitlines()
    table = [
        [re.sub(r'\[(.+?)\]\(.+?\)', r'\1', cell.strip()) for cell in line.strip('|').split('|')]
        for line in lines
        if line.startswith(('| config', '| ['))
    ]
    header = max(table, key=len, default=['config'])
    rows = [row for row in table if row[0] != 'config']
    listed = {row[0] for row in rows}
    rows += [[name] for name in config_names() if name not in listed]
    bases = sorted((folder('configs') / '_base_').glob('own_*.py'))
    rows += [
        [f'_base_/{path.stem}', *[''] * (len(header) - 2), 'docs/own_data.md'] for path in bases
    ]
    return [header, *(row + [''] * (len(header) - len(row)) for row in rows)]


def files() -> list[list[str]]:
    """Return the published files, where they come from, and where they are kept here."""
    from polynext_mm.weights import PUBLISHED
    from polynext_mm.weights.downloads import cached_path

    return [
        ['checkpoint', 'arch', 'norm', 'trained on', 'published', 'MB', 'url', 'file'],
        *(
            [
                f'polynext://{name}',
                file.arch,
                file.norm,
                file.holds,
                str(file.figure),
                _megabytes(file.size, cached_path(file.url)),
                file.url,
                str(cached_path(file.url)),
            ]
            for name, file in PUBLISHED.items()
        ),
    ]


def _megabytes(size: int | None, path: Path) -> str:
    """Return the size of a published file, or of its download; '?' if neither is known."""
    size = path.stat().st_size if size is None and path.is_file() else size
    return '?' if size is None else f'{size / 1e6:.0f}'


TABLES = {'archs': archs, 'configs': configs, 'files': files}


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    wanted = [word for word in args.words if word in TABLES] or list(TABLES)
    words = [word.lower() for word in args.words if word not in TABLES]
    found = False
    for name in wanted:
        header, *rows = TABLES[name]()
        rows = [row for row in rows if all(word in ' '.join(row).lower() for word in words)]
        if not rows:
            continue
        if args.names:
            print('\n'.join(row[0] for row in rows))
        else:
            print(('\n' if found else '') + '\n'.join(_aligned([header, *rows])))
        found = True
    if not found:
        print(f'nothing in {", ".join(wanted)} has all of: {" ".join(words)}', file=sys.stderr)
    return 0 if found else 1


def _joined(values: Sequence[object]) -> str:
    return ' '.join(map(str, values))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
