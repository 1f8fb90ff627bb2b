"""Run code once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[], object], failure: str) -> None:
    """Call ``action`` right after a module is executed.

    If the module is already imported, ``action`` runs now and its errors propagate. If it runs
    later, during another import, that import must not fail: an error of ``action`` is then logged
    in one line, and it is not tried again.

    Args:
        name: Name of the module.
        action: What to run.
        failure: Logged before the error: what does not work, and the remedy.
    """
    if sys.modules.get(name) is not None:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action, failure))


class _Finder:
    """Finds one module through the other finders, and extends its execution."""

    def __init__(self, name: str, action: Callable[[], object], failure: str):
        self.name = name
        self.action = action
        self.failure = failure
        self.is_searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self.is_searching:
            return None
        self.is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_searching = False
        if spec is not None and spec.loader is not None:
            self._extend(spec)
        return spec

    def _extend(self, spec: ModuleSpec) -> None:
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._act()

        # Set on this loader alone, which otherwise still provides source and resources.
        spec.loader.exec_module = exec_module

    def _act(self) -> None:
        try:
            self.action()
        except Exception as error:
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            logging.getLogger(__name__).warning('%s (%s)', self.failure, reason)
