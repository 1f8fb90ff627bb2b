"""Install the stand-in for mmcv's compiled extension if there is no such extension."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_EXTENSION = 'mmcv._ext'


def install_mmcv_ops() -> None:
    """Let ``mmcv.ops`` work without mmcv's compiled extension.

    Nothing happens if ``mmcv._ext`` can be imported or mmcv is not installed. Otherwise
    :mod:`polynext_mm.compat.mmcv_ext` becomes ``mmcv._ext``. That imports neither ``mmcv.ops`` nor
    torchvision, unless mmdet or mmseg was imported before, without ``mmcv.ops``. A second call
    changes nothing.

    Raises:
        ImportError: If mmcv is installed but cannot itself be imported.
    """
    try:
        import mmcv
    except ModuleNotFoundError as error:
        if error.name != 'mmcv':
            raise
        return
    try:
        importlib.import_module(_EXTENSION)
    except ImportError as error:
        stand_in = _load_stand_in(why=f'{type(error).__name__}: {error}')
        sys.modules[_EXTENSION] = stand_in
        mmcv._ext = stand_in
        _repeat_failed_imports()


def _load_stand_in(why: str) -> ModuleType:
    """Return ``mmcv_ext.py``, executed as the module ``mmcv._ext``.

    It is loaded under that name rather than aliased, so that its spec, which
    ``importlib.util.find_spec`` and mmcv's ``check_ops_exist`` look at, is that of ``mmcv._ext``.
    """
    spec = importlib.util.spec_from_file_location(
        _EXTENSION, Path(__file__).with_name('mmcv_ext.py')
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.why_missing = ' '.join(why.split())
    return module


def _repeat_failed_imports() -> None:
    """Give mmcv's operators to the modules of mmdet and mmseg that were imported too early.

    Many of them try ``from mmcv.ops import ...`` and define a placeholder if that fails. Modules
    already imported would keep their placeholders, and importing mmdet or mmseg before polynext_mm
    is common, since imports are sorted.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None)
        if name.partition('.')[0] not in ('mmdet', 'mmseg') or not file:
            continue
        source = Path(file).read_text(encoding='utf-8')
        if 'mmcv.ops' not in source:
            continue
        for attempt in ast.parse(source).body:
            if isinstance(attempt, ast.Try):
                _repeat_imports(attempt, module)


def _repeat_imports(attempt: ast.Try, module: ModuleType) -> None:
    """Set the names in ``module`` that its ``try`` statement imports from ``mmcv.ops``."""
    for statement in attempt.body:
        if isinstance(statement, ast.ImportFrom) and _is_of_mmcv_ops(statement):
            operators = importlib.import_module(statement.module)
            for wanted in statement.names:
                if hasattr(operators, wanted.name):
                    operator = getattr(operators, wanted.name)
                    setattr(module, wanted.asname or wanted.name, operator)


def _is_of_mmcv_ops(statement: ast.ImportFrom) -> bool:
    return statement.level == 0 and f'{statement.module}.'.startswith('mmcv.ops.')
