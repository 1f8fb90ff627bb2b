"""Every block, command, link and test that README and docs name exists and means what it says.

A block of a kind that is not known here fails, so that a new page is covered or complained about.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from polynext_mm.engine.checks.config import check_config
from polynext_mm.weights import PUBLISHED, downloads
from tests.docs.pages import PAGES, Block, blocks_of
from tests.docs.shell import check, command_lines
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.files import CONFIG, ROOT, mm_folder
from tests.helpers.networks import build

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
#: Not looked into: layouts of folders, messages (test_troubleshooting.py), the citation.
PLAIN = ('text', 'bibtex')
TESTS = {
    name
    for path in (ROOT / 'tests').rglob('test_*.py')
    for name in re.findall(r'^def (test_\w+)', path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize('block', BLOCKS, ids=str)
def test_a_block_is_of_a_known_kind_and_right(block, tmp_path):
    if block.kind == 'python':
        if is_config(block.text):
            check_settings_of(block, tmp_path)
        else:
            check_program(block.text)
    elif block.kind == 'bash':
        check_commands(block.text, block.page, tmp_path)
    elif block.kind == 'py':  # of mmseg 0.x, which nothing here reads: test_migration.py
        assert is_config(block.text)
    else:
        assert block.kind in PLAIN, f'{block}: {block.kind!r} is not one of the kinds tested here'


# Configs


def is_config(text: str) -> bool:
    """Whether a block is nothing but assignments."""
    kinds = (ast.Assign, ast.AugAssign)
    return all(isinstance(statement, kinds) for statement in ast.parse(text).body)


def check_settings_of(block: Block, folder: Path) -> None:
    for path in pasted(block.page, folder).values():
        assert path.is_file()
    cfg = Config.fromfile(write(block.text, folder / 'block.py'))
    check_config(cfg)
    for settings in backbones(cfg._cfg_dict):
        arguments = {
            key: value
            for key, value in settings.items()
            if key not in ('_delete_', 'init_cfg', 'compile_cells')
        }
        with torch.device('meta'):
            MODELS.build(arguments)


def backbones(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        if node.get('type') in ('PolyNeXt', 'MetaFormer'):
            yield node
        for value in node.values():
            yield from backbones(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from backbones(value)


def pasted(page: Path, folder: Path) -> dict[str, Path]:
    """Write the configs that a page says to save, as in "Save as `my_roofs.py`:"."""
    found = {}
    for name, text in re.findall(
        r'`(my_\w+\.py)`[^\n]*\n(?:[^\n`]+\n)*\n```python\n(.*?)```', page.read_text(), re.DOTALL
    ):
        found[name] = write(text, folder / name)
    return found


def write(text: str, path: Path) -> Path:
    """Write a config whose base, if it is one of mm's folders, is named by its path."""

    def located(match: re.Match) -> str:
        name = Path(match[2]).name
        if (path.parent / name).is_file() and name != path.name:
            return match[0]
        if match[2].startswith('PATH/TO/polynext_mm/'):
            return match[1] + str(ROOT / match[2].removeprefix('PATH/TO/polynext_mm/')) + match[3]
        (found,) = [
            file
            for package in ('mmseg', 'mmdet')
            for file in (mm_folder(package) / 'configs').rglob(name)
        ]
        return match[1] + str(found) + match[3]

    path.write_text(re.sub(r"(_base_ = \[?')([^']+\.py)(')", located, text))
    return path


# Programs


def check_program(text: str) -> None:
    """What a program imports exists, and what it calls takes the arguments that it gives."""
    tree = ast.parse(text)
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = imported(alias.name)
                top = alias.name.partition('.')[0]
                names[alias.asname or top] = module if alias.asname else imported(top)
        elif isinstance(node, ast.ImportFrom):
            module = imported(node.module)
            for alias in node.names:
                if module is not None:
                    names[alias.asname or alias.name] = member(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = resolved(node.func, names)
            if function is not None:
                check_arguments(function, node)


def imported(name: str) -> ModuleType | None:
    """Import a module; None where an optional package is not installed."""
    if importlib.util.find_spec(name.partition('.')[0]) is None:
        top = name.partition('.')[0]
        assert top in (ROOT / 'pyproject.toml').read_text(), f'{top} is installed by no extra'
        return None
    return importlib.import_module(name)


def member(module: ModuleType, name: str) -> object:
    if hasattr(module, name):
        return getattr(module, name)
    return importlib.import_module(f'{module.__name__}.{name}')


def resolved(node: ast.expr, names: dict[str, object]) -> object | None:
    """What an expression such as ``torch.onnx.export`` stands for, if it begins with an import."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        return None if owner is None else member_of(owner, node.attr)
    return None


def member_of(owner: object, name: str) -> object:
    return member(owner, name) if isinstance(owner, ModuleType) else getattr(owner, name)


def check_arguments(function: object, call: ast.Call) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in
        return
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    signature.bind_partial(*[None] * len(call.args), **keywords)


# Commands


def check_commands(text: str, page: Path, folder: Path) -> None:
    configs = pasted(page, folder)
    for command in command_lines(text):
        check(command, configs)
        if command[:2] == ['python', '-c']:
            check_program(command[2])


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_are_right(page, tmp_path):
    spans = re.findall(r'(?<!`)`([^`\n]+)`(?!`)', page.read_text())
    for span in spans:
        if re.match(r'(polynext-mm|make|python (tools|benchmarks)/\S+|python -m) \S', span):
            check_commands(span, page, tmp_path)
        options = re.match(r'--cfg-options ([\w.]+=\S+)$', span)
        if options and 'FOLDER' not in span and not options[1].startswith('data_root'):
            check_commands(f'python tools/train.py {CONFIG} {span}', page, tmp_path)


# Links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '')
        slug = re.sub(r'[^\w\- ]', '', plain.lower()).replace(' ', '-')
        found.append(f'{slug}-{found.count(slug)}' if slug in found else slug)
    return set(found)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f'{page.name}: {target}'
        assert not anchor or anchor in anchors(file), f'{page.name}: {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    for span in re.findall(r'`([^`\n]+)`', page.read_text()):
        named = re.fullmatch(r'(tests/[\w/]+(?:\.py)?)?(?:::)?(test_\w+)?', span)
        if named and 'NAME' not in span:
            path, name = named.groups()
            assert path is None or (ROOT / path).exists(), f'{page.name}: {span}'
            # test_pipeline and the like are settings
            is_test = name and (path or name.count('_') > 2)
            assert not is_test or name in TESTS, f'{page.name}: {span}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_code_is_in_fenced_blocks_of_a_kind(page):
    """What is merely indented is not looked at above."""
    outside = re.sub(r'^ *```.*?^ *```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for before, line in zip(outside.splitlines(), outside.splitlines()[1:]):
        assert before.strip() or not line.startswith('    '), f'{page.name}: {line}'


def test_every_page_is_reachable_from_the_readme():
    text = (ROOT / 'README.md').read_text()
    reached = set(re.findall(r'\]\((docs/\w+\.md)', text))
    assert {f'docs/{page.name}' for page in (ROOT / 'docs').glob('*.md')} <= reached


# Run, not only read


PROGRAMS = [
    pytest.param(block, marks=[pytest.mark.slow] * ('export' in block.text), id=str(block))
    for block in BLOCKS
    if block.kind == 'python'
    and not is_config(block.text)
    # what reads files of its own has a test of its own
    and not re.search(r"'\w+\.(onnx|pt2|png|jpg)'\W", block.text)
]


@pytest.mark.parametrize('block', PROGRAMS)
def test_a_program_runs(block, tmp_path, monkeypatch):
    """With made-up weights where published files would be downloaded to."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    for name, published in PUBLISHED.items():
        if re.search(rf'\b{name}\b', block.text):
            torch.save(imagenet_weights(name), downloads.cached_path(published.url))
            torch.save(imagenet_weights(name), tmp_path / 'hub' / 'checkpoints' / published.file)
    monkeypatch.chdir(tmp_path)
    backbone = build().eval()
    given = dict(model=backbone, backbone=backbone, images=torch.randn(2, 3, 64, 64))
    exec(compile(block.text, str(block), 'exec'), given)
