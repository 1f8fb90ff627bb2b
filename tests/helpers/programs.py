"""Scripts, here or in processes of their own."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import socket
import subprocess
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from unittest import mock

from tests.helpers.files import ROOT


def script(path: str) -> ModuleType:
    """Import a script of benchmarks/ or demo/, which imports others of its folder by name."""
    folder, _, name = path.rpartition('/')
    with mock.patch.object(sys, 'path', [str(ROOT / folder), *sys.path]):
        return importlib.import_module(name)


def arguments_are(*arguments) -> contextlib.AbstractContextManager:
    """Set the arguments that a script finds in ``sys.argv``."""
    return mock.patch.object(sys, 'argv', ['script.py', *map(str, arguments)])


def call_tool(name: str, *arguments) -> str | None:
    """Run a script of tools/ in this process; return the message it exits with, if it fails."""
    with arguments_are(*arguments):
        try:
            runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        except SystemExit as end:
            return str(end) if end.code else None


def run(
    *command, cwd: Path | None = None, succeeds: bool = True, timeout: float = 900, **env: str
) -> str:
    """Run a command to its end, check whether it succeeds, and return all that it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def python(*arguments, **settings) -> str:
    return run(sys.executable, '-W', 'ignore', *arguments, **settings)


MM_PACKAGES = ('mmengine', 'mmcv', 'mmseg', 'mmdet')

_HIDE = """
import sys


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {packages}:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def python_without(packages: Collection[str], program: str, *arguments, **settings) -> str:
    """Run a program in a fresh interpreter that finds everything but some packages."""
    hide = _HIDE.format(packages=set(packages))
    return python('-c', hide + textwrap.dedent(program), *arguments, **settings)


def free_port() -> int:
    """For processes that look for each other."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
