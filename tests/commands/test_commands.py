"""The command polynext-mm: its table, its help, and the configs that it finds by name."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from mmengine.config import Config

import polynext_mm
from polynext_mm import resources
from polynext_mm.commands import COMMANDS, main
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.programs import python

NAME = 'upernet_cpolynext_s_ade20k'


def test_the_help_lists_every_command(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    listed = re.findall(r'^  ([a-z-]+)  ', printed.partition('commands:')[2], re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize('name', sorted(set(COMMANDS) - {'benchmark'}))
def test_every_command_is_a_module_with_a_parser_of_its_name(name):
    module = importlib.import_module(f'polynext_mm.commands.{COMMANDS[name][0]}')
    assert module.build_parser().prog == f'polynext-mm {name}'
    assert callable(module.main)


@pytest.mark.heavy
def test_help_needs_neither_torch_nor_mm():
    program = f"""
        import sys
        from polynext_mm.commands import main

        for name in {sorted(set(COMMANDS) - {'benchmark'})}:
            try:
                main([name, '--help'])
            except SystemExit as end:
                assert end.code == 0
        print({{'torch', 'mmengine', 'matplotlib'}} & set(sys.modules))
    """
    printed = python('-c', textwrap.dedent(program))
    assert printed.splitlines()[-1] == 'set()'
    assert printed.count('usage: polynext-mm ') == len(COMMANDS) - 1


def test_the_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out.strip() == polynext_mm.__version__


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(['trian', 'config.py'])
    assert end.value.code == 2
    assert "there is no command 'trian': it is one of new, train, test" in capsys.readouterr().err


def test_every_tool_calls_a_command():
    for tool in (ROOT / 'tools').glob('*.py'):
        if tool.stem != 'dist_run':
            program = tool.read_text()
            assert 'from polynext_mm.commands import main\n' in program
            assert re.search(r"main\(\['([a-z-]+)', ", program)[1] in COMMANDS


def test_what_the_system_refuses_is_one_line(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text('')
    long = str(tmp_path / ('x' * 300))
    for arguments in (['train', long], ['predict', long, config, config], ['plot', long]):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        assert re.fullmatch(r'\w+Error: .*x{300}.*', end.value.code)


@pytest.mark.heavy
def test_names_of_any_encoding_are_printed():
    program = 'import sys; from polynext_mm.commands import _print_any_name as to'
    program += "; to(); print('im\\udcff.png')"
    assert python('-c', program, PYTHONIOENCODING='utf-8:strict').strip() == 'im\\udcff.png'


# docs/tools.md

PAGE = (ROOT / 'docs' / 'tools.md').read_text()
LINES = re.findall(r'^polynext-mm (.+?)(?:\s+#.*)?$', PAGE, re.MULTILINE)


def test_the_page_lists_every_command_and_tool():
    rows = re.findall(r'^\| `([a-z-]+).*?\| (?:`(.*?)`)? *\|', PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(COMMANDS)
    tools = {f'tools/{path.name}' for path in (ROOT / 'tools').glob('*.py')}
    listed = {tool for _, tool in rows if tool.startswith('tools/')}
    assert listed == tools - {'tools/dist_run.py'}


@pytest.mark.parametrize('line', LINES)
def test_the_pages_command_lines_are_understood(line):
    name, *arguments = shlex.split(line)
    parser = importlib.import_module(f'polynext_mm.commands.{COMMANDS[name][0]}').build_parser()
    parser.parse_args(arguments)


# Configs by name


@pytest.mark.parametrize(
    'name', [NAME, f'{NAME}.py', f'configs/{NAME}', f'configs/{NAME}.py', CONFIG.with_stem(NAME)]
)
def test_a_config_is_named_with_or_without_path_and_suffix(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resources.find_config(name)).samefile(ROOT / 'configs' / f'{NAME}.py')


def test_a_config_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f'{NAME}.py').write_text('mine = True')
    assert resources.find_config(NAME) == f'{NAME}.py'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('upernet_cpolynext_s_ade20', f'did you mean {NAME}'),
        ('elsewhere/nothing.py', '`polynext-mm list` has all'),
        (f'elsewhere/{NAME}', 'there is no config elsewhere/'),
    ],
)
def test_an_absent_config_is_told(name, message):
    with pytest.raises(resources.ConfigNotFoundError, match=message):
        resources.find_config(name)


@pytest.mark.heavy
def test_configs_of_other_projects_inherit_wherever_ours_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # of the same name as ours: it must not inherit from itself
    path = Path(f'{NAME}.py')
    path.write_text(
        f"_base_ = __import__('polynext_mm').config_file('{NAME}')\n"
        'model = dict(decode_head=dict(num_classes=7))\n'
    )
    cfg = Config.fromfile(path)
    assert cfg.model.decode_head.num_classes == 7
    assert cfg.model.backbone.arch == 'cpolynext_s'
    # in a process that has not imported polynext_mm
    program = "from mmengine.config import Config; print(Config.fromfile('{}').model.backbone.arch)"
    assert python('-c', program.format(path)).splitlines()[-1] == 'cpolynext_s'
    path.write_text(
        "_base_ = [__import__('polynext_mm').config_file('_base_/default_runtime.py')]\n"
    )
    assert Config.fromfile(path).custom_imports.imports == ['polynext_mm']
