"""Which packages bring mmengine and mmcv, and what to tell someone who has none.

Two sets of packages carry the same modules: OpenMMLab's own and OneDL's continuation of them.
Installing one over the other breaks both, so polynext_mm requires neither by name; each is an
extra of the same name as the set: ``onedl`` and ``openmmlab``.
"""

import importlib.util
from importlib import metadata

_STACK_OF = {
    'mmengine': 'openmmlab',
    'mmcv': 'openmmlab',
    'mmcv-lite': 'openmmlab',
    'onedl-mmengine': 'onedl',
    'onedl-mmcv': 'onedl',
}

_COMPILE_MMCV = {
    # PyPI holds only the source of onedl-mmcv. Built in pip's isolation it finds no torch and
    # leaves its operators out, and pip would keep such a build in its cache.
    'onedl': (
        'pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv'
    ),
    'openmmlab': 'pip uninstall -y mmcv-lite mmcv && mim install mmcv',
}


def stack_name() -> str | None:
    """Return ``'onedl'`` or ``'openmmlab'``, whichever comes first on the path, or ``None``."""
    names = (distribution.name or '' for distribution in metadata.distributions())
    stacks = (_STACK_OF.get(name.lower().replace('_', '-')) for name in names)
    return next(filter(None, stacks), None)


def how_to_compile_mmcv() -> str:
    """Return the shell command that gives this environment an mmcv with compiled operators."""
    return _COMPILE_MMCV[stack_name() or 'onedl']


def check_stack() -> None:
    """Check that mmengine and mmcv can be found, without importing them.

    Raises:
        ImportError: If one of them is missing; the message says what to install.
    """
    for name in ('mmengine', 'mmcv'):
        if importlib.util.find_spec(name) is None:
            # Where half of a set is there already, the other set must not go on top of it.
            extra = stack_name() or 'onedl'
            raise ImportError(
                f'polynext_mm needs {name}, which is not installed: '
                f"run `pip install 'polynext-mm[{extra}]'`",
                name=name,
            )
