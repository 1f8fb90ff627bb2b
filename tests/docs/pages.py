"""The pages of the documentation, and their fenced blocks."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.helpers.files import ROOT

PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'configs' / 'README.md',
    *sorted((ROOT / 'docs').glob('*.md')),
]


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: Its file.
        line: Number of its first line.
        kind: What follows the fence: 'python', 'bash', ...
        text: What is inside.
    """

    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, those inside lists included.

    Raises:
        ValueError: If a block is not closed.
    """
    found, fence, start, lines = [], None, 0, []
    for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), start=1):
        match = re.match(r'( *)(```+)(.*)', line)
        if fence is None and match:
            fence, start, lines = match, number + 1, []
        elif fence is not None and match and match[2] == fence[2] and not match[3].strip():
            found.append(Block(page, start, fence[3].strip(), ''.join(lines)))
            fence = None
        elif fence is not None:
            lines.append(line.removeprefix(fence[1]) + '\n')
    if fence is not None:
        raise ValueError(f'{page}:{start}: the block is not closed')
    return found


def example(page: str, mark: str) -> str:
    """Return the one Python block of a page that contains ``mark``.

    Args:
        page: Its path below the root, such as 'docs/segmentation.md'.
        mark: A part of its text.
    """
    (found,) = [
        block.text
        for block in blocks_of(ROOT / page)
        if block.kind == 'python' and mark in block.text
    ]
    return found


def replaced(text: str, *pairs: tuple[str, object]) -> str:
    """Return ``text`` with the first of each pair exchanged for the second; it must be there."""
    for old, new in pairs:
        assert old in text, f'{old} is not in the example'
        text = text.replace(old, str(new))
    return text
