"""Do something once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` right after a top-level module has been executed.

    If the module is imported already, that is now. Whatever ``action`` raises is raised by the
    import of the module.
    """
    if sys.modules.get(name) is not None:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Finds one module as the other finders do, and adds to what is done when it is executed."""

    def __init__(self, name: str, action: Callable[[], object]):
        self.name = name
        self.action = action
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
                self.action()
                sys.meta_path.remove(self)

        # An attribute of this loader alone, which otherwise stays what it is for whoever asks it
        # for source or resources.
        spec.loader.exec_module = exec_module
