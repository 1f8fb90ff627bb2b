"""Command lines of the documentation, checked without being run: do the files, options, targets and
settings that they name exist?"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from mmengine.config import Config

from polynext_mm.commands import COMMANDS
from polynext_mm.engine import launch
from polynext_mm.engine.checks.config import check_config
from polynext_mm.resources import find_config
from tests.helpers.files import CONFIG, ROOT

# Of the shell, and of programs whose arguments are their own.
_OTHERS = ('[', 'cd', 'exit', 'export', 'git', 'if', 'mim', 'scontrol', 'source')
_SEPARATORS = ('&&', '||', '|', ';')
TARGETS = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
EXTRAS = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell script as words, without comments and assignments.

    Raises:
        ValueError: If a quotation is not closed.
    """
    waiting = ''
    text = re.sub(r'\$\([^)]*\)', 'VALUE', text.replace('\\\n', ' '))
    for line in text.splitlines():
        waiting += line + '\n'
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        waiting = ''
        command: list[str] = []
        for word in [*words, ';']:
            if word in _SEPARATORS:
                if command:
                    yield command
                command = []
            elif command or not re.match(r'\w+=', word):
                command.append(word)
    if waiting:
        raise ValueError(f'a quotation is not closed in {waiting!r}')


def check(command: Sequence[str], pasted: dict[str, Path]) -> None:
    """Check a command.

    Args:
        command: Its words.
        pasted: Configs that the page tells the reader to write, by the names of their files.

    Raises:
        ValueError: If something that it names does not exist.
    """
    program, *arguments = command
    if program == 'python':
        _check_python(arguments, pasted)
    elif program == 'polynext-mm':
        _check_polynext_mm(arguments, pasted)
    elif program == 'make':
        _check_targets(arguments)
    elif program == 'pip':
        _check_pip(arguments)
    elif program == 'torchrun':
        _check_torchrun(arguments, pasted)
    elif program in ('bash', 'sh', 'srun'):
        check(arguments, pasted)
    elif program.endswith('.sh'):
        _check_shell_tool(program, arguments, pasted)
    elif program not in _OTHERS:
        raise ValueError(f'{program} is a program that tests/docs/shell.py does not know')


def _check_python(arguments: Sequence[str], pasted: dict[str, Path]) -> None:
    first, *rest = arguments
    if first == '-c':
        ast.parse(rest[0])
    elif first == '-m':
        module, *rest = rest
        if module == 'polynext_mm':
            _check_polynext_mm(rest, pasted)
        elif module == 'pytest':
            _must_exist(word for word in rest if word.startswith('tests'))
        elif module != 'build':
            raise ValueError(f'python -m {module} is not known')
    else:
        _check_script(first, rest, pasted)


def _check_script(script: str, arguments: Sequence[str], pasted: dict[str, Path]) -> None:
    _must_exist([script])
    _parse(parser_of(script), script, arguments, pasted)


def _check_polynext_mm(arguments: Sequence[str], pasted: dict[str, Path]) -> None:
    name, *rest = arguments
    if name.isupper() or name == '--version':  # COMMAND
        return
    if name not in COMMANDS:
        raise ValueError(f'polynext-mm has no command {name}')
    if name in ('run', 'timm'):  # the arguments are those of somebody's script
        return
    if name == 'benchmark':
        _parse(parser_of('benchmarks/run.py'), name, rest, pasted)
        return
    module = importlib.import_module(f'polynext_mm.commands.{COMMANDS[name][0]}')
    _parse(module.build_parser().parse_args, name, rest, pasted)
    if name == 'new' and len(rest) > 1:  # writes a config that is named as the folder
        pasted[f'{Path(rest[1]).name}.py'] = CONFIG


def _check_targets(arguments: Sequence[str]) -> None:
    for word in arguments:
        if (
            not word.startswith('-')
            and '=' not in word
            and word not in TARGETS
            and word != 'TARGET'
        ):
            raise ValueError(f'the Makefile has no target {word}')


def _check_pip(arguments: Sequence[str]) -> None:
    for extras in re.findall(r'\.\[([\w,]+)\]', ' '.join(arguments)):
        for extra in extras.split(','):
            if extra not in EXTRAS:
                raise ValueError(f'pyproject.toml has no extra {extra}')
    _must_exist(word for word in arguments if word.startswith('requirements/'))


def _check_torchrun(arguments: Sequence[str], pasted: dict[str, Path]) -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(list(arguments))
    script = ['-m', known.training_script] if known.module else [known.training_script]
    _check_python([*script, *known.training_script_args], pasted)


def _check_shell_tool(script: str, arguments: Sequence[str], pasted: dict[str, Path]) -> None:
    _must_exist([script])
    task = 'test' if 'test' in Path(script).name else 'train'
    # slurm_*.sh PARTITION JOB CONFIG [CHECKPOINT or WORK_DIR], dist_*.sh CONFIG [CHECKPOINT] GPUS
    own = list(arguments[2:]) if 'slurm' in script else list(arguments)
    if 'slurm' in script and task == 'train' and own[1:] and not own[1].startswith('-'):
        del own[1]
    if 'dist' in script:
        del own[2 if task == 'test' else 1]
    _check_script(f'tools/{task}.py', own, pasted)


def parser_of(script: str) -> Callable[[Sequence[str]], argparse.Namespace]:
    """Return the function that parses the arguments of a script in this repository."""
    text = (ROOT / script).read_text()
    command = re.search(r"main\(\['([\w-]+)'", text)
    if command:
        module = importlib.import_module(f'polynext_mm.commands.{COMMANDS[command[1]][0]}')
        return module.build_parser().parse_args
    module = _module(script)

    def parse(arguments: Sequence[str]) -> argparse.Namespace:
        with mock.patch.object(sys, 'argv', [script, *arguments]):
            return module.parse_args()

    return parse


@functools.cache
def _module(script: str):
    spec = importlib.util.spec_from_file_location(Path(script).stem + '_of_docs', ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with mock.patch.object(sys, 'path', [str((ROOT / script).parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def _parse(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    name: str,
    arguments: Sequence[str],
    pasted: dict[str, Path],
) -> None:
    if '...' in arguments or not arguments:  # named, not shown
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            args = parse(list(arguments))
    except SystemExit as end:
        if end.code not in (0, None):  # --help ends with 0
            raise ValueError(
                f'{name} does not take {list(arguments)}: {printed.getvalue()}'
            ) from end
        return
    if isinstance(getattr(args, 'config', None), (str, Path)):
        _check_config(args, pasted)


def _check_config(args: argparse.Namespace, pasted: dict[str, Path]) -> None:
    name, options = str(args.config), getattr(args, 'cfg_options', None)
    if name.isupper():  # CONFIG
        path = CONFIG
    else:
        path = pasted.get(name) or find_config(name)
    if options:
        check_settings(path, options)


def check_settings(path: str | Path, options: dict) -> None:
    """Check that settings of a command line are settings of a config, or at least of mm's.

    Raises:
        ValueError: If one is not.
    """
    file_keys = read(path).keys()
    cfg = launch.read_config(
        argparse.Namespace(config=str(path), cfg_options=options, work_dir='somewhere')
    )
    check_config(cfg, file_keys, options)
    for key in options:
        *parents, _ = key.split('.')
        node = read(path)
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.get(parent)
            if node is None and parent == parents[0]:
                break  # mm reads it, or check_config would have complained
            if node is None:
                raise ValueError(f'{path} has no {key}')


@functools.cache
def read(path: str | Path) -> Config:
    return Config.fromfile(path)


def _must_exist(paths) -> None:
    for path in paths:
        if not (ROOT / path).exists():
            raise ValueError(f'there is no {path}')
