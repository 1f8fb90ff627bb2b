"""Which packages provide mmengine and mmcv, and what to install if they are missing.

Two sets of packages carry the same modules: OpenMMLab's own and OneDL's continuation of them.
Installing one over the other breaks both, so polynext_mm requires neither; each is an extra:
``onedl`` and ``openmmlab``.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Sequence
from typing import Any

_STACK_OF = {
    'mmengine': 'openmmlab',
    'mmcv': 'openmmlab',
    'mmcv-lite': 'openmmlab',
    'onedl-mmengine': 'onedl',
    'onedl-mmcv': 'onedl',
}

_COMPILE_MMCV = {
    # PyPI has only the source of onedl-mmcv. A build in pip's isolation finds no torch and leaves
    # out the operators, and pip would keep that build in its cache.
    'onedl': (
        'pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv'
    ),
    'openmmlab': "pip uninstall -y mmcv-lite mmcv && mim install 'mmcv>=2.1,<2.2'",
}


class MissingPackageError(ImportError):
    """A package is not installed; the message says what to install."""


def stack_name() -> str | None:
    """Return ``'onedl'`` or ``'openmmlab'``, whichever comes first on the path, or ``None``."""
    from importlib import metadata  # takes longer to import than this whole package

    return next(filter(None, map(_stack_of, metadata.distributions())), None)


def _stack_of(distribution: Any) -> str | None:
    has_name = hasattr(distribution, 'name')  # from Python 3.10 on
    name = distribution.name if has_name else distribution.metadata['Name']
    return _STACK_OF.get((name or '').lower().replace('_', '-'))


def stacks_in_one_place() -> list[str]:
    """Return folders with packages of both sets, which overwrite each other there."""
    from importlib import metadata

    found: dict[str, set[str]] = {}
    for distribution in metadata.distributions():
        stack = _stack_of(distribution)
        if stack is not None:
            found.setdefault(str(distribution.locate_file('')), set()).add(stack)
    return [place for place, stacks in found.items() if len(stacks) > 1]


def how_to_compile_mmcv() -> str:
    """Return the shell command that gives this environment an mmcv with compiled operators."""
    return _COMPILE_MMCV[stack_name() or 'onedl']


def check_stack(modules: Sequence[str] = ('mmengine', 'mmcv')) -> None:
    """Check that the modules of a set can be found, without importing them.

    Raises:
        ImportError: If one of them is missing; the message says what to install.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(
                f'polynext_mm needs {name}, which is not installed: {_how_to_install(name)}',
                name=name,
            )


def require_mmengine() -> None:
    """Import mmengine, with which this package registers everything.

    Raises:
        ImportError: If it is missing; the message says what to install.
    """
    check_stack(['mmengine'])
    importlib.import_module('mmengine')


def _how_to_install(module: str) -> str:
    # If half of one set is installed, do not suggest installing the other over it.
    extra = stack_name() or 'onedl'
    if (extra, module) == ('openmmlab', 'mmcv'):  # the extra leaves mmcv to the user
        return (
            "run `pip install 'mmcv-lite>=2.1,<2.2'`, or, for compiled operators, "
            "`mim install 'mmcv>=2.1,<2.2'`"
        )
    in_a_clone = f"`pip install '.[{extra}]'` in a clone of polynext_mm"
    packages = _packages_of(extra)
    if not packages:
        return f'run {in_a_clone}'
    return f'run `pip install {shlex.join(packages)}`, or {in_a_clone}'


def _packages_of(extra: str) -> list[str]:
    """Return the requirements of an extra; none if this package is not installed itself.

    They come from pyproject.toml, through the metadata of the installed package.
    """
    from importlib import metadata

    try:
        requirements = metadata.requires('polynext-mm') or []
    except metadata.PackageNotFoundError:
        return []
    parts = (requirement.partition(';') for requirement in requirements)
    return [package.strip() for package, _, marker in parts if extra in re.findall(r'\w+', marker)]
