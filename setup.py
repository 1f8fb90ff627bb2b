"""Put the folders beside the package into it when a wheel is built; the rest is pyproject.toml.

polynext_mm/resources.py finds them in an installed package, and in a clone or an editable
installation, which are left alone, where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ('configs', 'tools', 'benchmarks')


class BuildWithFolders(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in FOLDERS:
            target = Path(self.build_lib, 'polynext_mm', name)
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
            shutil.copytree(name, target, ignore=shutil.ignore_patterns('__pycache__'))


setup(cmdclass={'build_py': BuildWithFolders})
