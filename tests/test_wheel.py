"""The wheel: what it holds, that the source archive builds the same, and that it works anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import polynext_mm
from polynext_mm.compat.packages import stack_name
from tests.helpers.configs import as_arguments, tiny_options
from tests.helpers.files import ROOT
from tests.helpers.programs import python, run
from tests.helpers.samples import sample_as_ade20k

pytestmark = pytest.mark.heavy

NAME = 'upernet_cpolynext_t_ade20k'
FOLDERS = ('configs', 'tools', 'benchmarks')
FILES = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'CHANGELOG.md', 'LICENSE')
BUILD = 'from setuptools import build_meta; build_meta.build_{}("dist")'

pytest.importorskip('setuptools', minversion='77')


def copy_sources(root: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, root)
    for name in ('polynext_mm', *FOLDERS):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('__pycache__'))


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """A copy of what is built, in which importing the package would be an error."""
    root = tmp_path_factory.mktemp('sources')
    copy_sources(root)
    with open(root / 'polynext_mm' / '__init__.py', 'a') as file:
        file.write('\nraise SystemExit("the version is read by importing the package")\n')
    return root


@pytest.fixture(scope='module')
def wheel(sources, tmp_path_factory):
    """The wheel that the source archive builds."""
    python('-c', BUILD.format('sdist'), cwd=sources)
    (archive,) = (sources / 'dist').glob('*.tar.gz')
    folder = tmp_path_factory.mktemp('from_archive')
    with tarfile.open(archive) as file:
        file.extractall(folder, filter='data')
    unpacked = folder / archive.name.removesuffix('.tar.gz')
    python('-c', BUILD.format('wheel'), cwd=unpacked)
    (built,) = (unpacked / 'dist').glob('*.whl')
    return built


def packed(path: Path) -> dict[str, int]:
    """Return the checksums of a wheel's files by name."""
    with zipfile.ZipFile(path) as file:
        return {entry.filename: entry.CRC for entry in file.infolist() if not entry.is_dir()}


def test_the_wheel_holds_package_configs_tools_and_benchmarks(wheel, sources):
    assert wheel.stat().st_size < 1_000_000
    assert wheel.name == f'polynext_mm-{polynext_mm.__version__}-py3-none-any.whl'
    names = {name for name in packed(wheel) if '.dist-info/' not in name}
    modules = {str(path.relative_to(sources)) for path in (sources / 'polynext_mm').rglob('*.py')}
    folders = {
        f'polynext_mm/{path.relative_to(sources)}'
        for name in FOLDERS
        for path in (sources / name).rglob('*')
        if path.is_file()
    }
    assert names == modules | folders | {'polynext_mm/py.typed'}


def test_the_sources_build_the_same_wheel(wheel, sources):
    python('-c', BUILD.format('wheel'), cwd=sources)
    (direct,) = (sources / 'dist').glob('*.whl')
    assert packed(direct) == packed(wheel)


# Installed, in an empty directory


def install(wheel: Path, target: Path, interpreter: str | Path = sys.executable) -> None:
    run(
        *(interpreter, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--no-compile'),
        *('--disable-pip-version-check', '--target', target, wheel),
    )


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The package installed from a wheel of the real sources."""
    folder = tmp_path_factory.mktemp('installed')
    copy_sources(folder)
    python('-c', BUILD.format('wheel'), cwd=folder)
    (built,) = (folder / 'dist').glob('*.whl')
    install(built, folder / 'site')
    return folder / 'site'


def interpreter_of(stack: str) -> Path:
    """Return this interpreter, or that of the environment of `make test-openmmlab`."""
    if stack == stack_name():
        return Path(sys.executable)
    return Path(f'{sys.prefix}-{stack}') / 'bin' / 'python'


@pytest.fixture(params=['onedl', 'openmmlab'])
def command(request, installed, tmp_path):
    """A function that runs polynext-mm in an empty directory."""
    interpreter = interpreter_of(request.param)
    if not interpreter.exists():
        pytest.skip(f'there is no environment with the packages of {request.param}')
    work = tmp_path / 'empty'
    work.mkdir()

    def call(*arguments, **settings) -> str:
        return run(
            *(interpreter, '-m', 'polynext_mm', *arguments),
            cwd=work,
            PYTHONPATH=str(installed),
            PYTHONWARNINGS='ignore',
            **settings,
        )

    call.folder, call.stack, call.installed = work, request.param, installed
    return call


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_directory(command, tmp_path):
    printed = command('doctor')
    assert f'wheel at {command.installed}' in printed and 'all works' in printed
    assert f'one set: {command.stack}' in printed
    assert NAME in command('list', 'configs', '--names').splitlines()
    assert command('config', NAME, '--path').startswith(str(command.installed))

    options = as_arguments(tiny_options(sample_as_ade20k(tmp_path), iters=2))
    printed = command('train', NAME, *options)
    assert 'validation at 2' in printed
    checkpoint = command.folder / 'work_dirs' / NAME / 'iter_2.pth'
    assert torch.load(checkpoint, weights_only=False)['meta']['iter'] == 2
    assert 'mIoU' in command('test', f'{NAME}.py', checkpoint, *options)
    overrides = [f'model.{part}_head.channels=16' for part in ('decode', 'auxiliary')]
    config = command('config', NAME, '--cfg-options', *overrides)
    (command.folder / 'small.py').write_text(config[config.index('auto_scale_lr') :])
    assert 'heads: loaded' in command('doctor', 'small', checkpoint)

    image = tmp_path / 'photo.png'
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(image)
    printed = command('predict', image, f'configs/{NAME}', checkpoint, *options)
    assert printed.split()[-1] == 'predictions/photo.png'
    assert (command.folder / 'predictions' / 'photo.png').is_file()

    mine = command.folder / 'mine.py'
    mine.write_text(
        f"_base_ = __import__('polynext_mm').config_file('{NAME}')\nwork_dir = 'here'\n"
    )
    assert "work_dir = 'here'" in command('config', 'mine')
    assert 'usage' in command('benchmark', '--help')
    assert 'run `make demo` in a clone' in command('demo', succeeds=False)


def interpreters() -> dict[str, Path]:
    """Return the interpreters that this machine has of the versions that are supported."""
    found = {}
    for minor in range(9, 14):
        version = f'3.{minor}'
        places = [shutil.which(f'python{version}')]
        places += sorted((Path.home() / '.pyenv' / 'versions').glob(f'{version}.*/bin/python'))
        for place in filter(None, places):
            answer = subprocess.run([place, '-m', 'pip', '--version'], capture_output=True)
            if answer.returncode == 0:
                found[version] = Path(place)
                break
    return found


@pytest.mark.slow
@pytest.mark.parametrize('version', ['3.9', '3.10', '3.11', '3.12', '3.13'])
def test_every_supported_python_installs_and_imports_it(version, installed, tmp_path):
    interpreter = interpreters().get(version)
    if interpreter is None:
        pytest.skip(f'there is no Python {version} with pip on this machine')
    install(next((installed.parent / 'dist').glob('*.whl')), tmp_path / 'site', interpreter)
    settings = dict(cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
    run(interpreter, '-m', 'compileall', '-q', tmp_path / 'site', **settings)
    printed = run(interpreter, '-c', 'import polynext_mm as p; print(p.__version__)', **settings)
    assert printed.strip() == polynext_mm.__version__
    for arguments in (['--help'], ['train', '--help'], ['list', 'configs', '--names']):
        printed = run(interpreter, '-m', 'polynext_mm', *arguments, **settings)
    assert NAME in printed.splitlines()
    has_torch = subprocess.run([interpreter, '-c', 'import torch'], capture_output=True)
    if has_torch.returncode:
        printed = run(interpreter, '-m', 'polynext_mm', 'doctor', succeeds=False, **settings)
        assert '-> pip install torch\n' in printed and 'Traceback' not in printed
        assert '-> pip install mmcv' not in printed  # which of the two sets?


# What pip does to an environment that works


WORKING = {
    'torch': '2.1.2+cu118',
    'torchvision': '0.16.2+cu118',
    'numpy': '1.26.4',
    'mmcv': '2.1.0',
    'mmengine': '0.10.7',
    'mmsegmentation': '1.2.2',
    'mmdet': '3.3.0',
    'safetensors': '0.4.0',
    'ftfy': '6.1.1',
    'regex': '2023.12.25',
    'setuptools': '69.0.3',
}


@pytest.mark.slow
@pytest.mark.parametrize('extra', ['', '[openmmlab]'])
def test_installing_changes_nothing_in_an_environment_of_mm(installed, tmp_path, extra):
    """pip's dry run adds this package alone, and is not let look for any other."""
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env')
    interpreter = tmp_path / 'env' / 'bin' / 'python'
    program = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    place = Path(run(interpreter, '-c', program).strip())
    for name, version in WORKING.items():
        folder = place / f'{name}-{version}.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
        )
        (folder / 'INSTALLER').write_text('pip')
    (wheel,) = (installed.parent / 'dist').glob('*.whl')
    report = tmp_path / 'report.json'
    run(
        *(sys.executable, '-m', 'pip', '--python', interpreter, 'install', '-q', '--dry-run'),
        *('--disable-pip-version-check', '--no-index', '--report', report),
        f'polynext-mm{extra} @ {wheel.as_uri()}',
        PYTHONPATH='',
    )
    changed = json.loads(report.read_text())['install']
    assert [package['metadata']['name'] for package in changed] == ['polynext-mm']
