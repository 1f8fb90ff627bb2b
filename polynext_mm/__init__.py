"""PolyNeXt backbones for OpenMMLab; the networks themselves need torch alone.

``custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)`` in a config is all
that another project needs: importing this package registers backbones, hooks and optimizer wrapper
with mmengine, makes its loader read PolyNeXt's files, and makes ``mmcv.ops`` work without mmcv's
compiled extension. If mmengine has not been imported yet, this happens as soon as it is, so that
:mod:`polynext_mm.nn` and :mod:`polynext_mm.weights` neither need it nor wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .compat import install_coco_reader, install_mmcv_ops, when_imported

if TYPE_CHECKING:
    from .backbones import MetaFormer, PolyNeXt
    from .inference import Predictor
    from .nn.arch import widths
    from .resources import config_file

__all__ = ['MetaFormer', 'PolyNeXt', 'Predictor', 'config_file', 'widths']
__version__ = '0.1.0'

_SUBPACKAGES = ('backbones', 'datasets', 'engine', 'inference', 'nn', 'weights')


def __getattr__(name: str) -> Any:
    """Import a subpackage or a backbone on first use.

    Raises:
        ImportError: If it needs mmengine, which is not installed; the message says what to do.
    """
    if name in _SUBPACKAGES:
        return importlib.import_module(f'{__name__}.{name}')
    if name in __all__:
        modules = dict(config_file='resources', Predictor='inference', widths='nn.arch')
        module = modules.get(name, 'backbones')
        return getattr(importlib.import_module(f'{__name__}.{module}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *__all__})


def _register() -> None:
    install_mmcv_ops()
    install_coco_reader()
    importlib.import_module(f'{__name__}.engine')  # this also registers the backbones
    importlib.import_module(f'{__name__}.engine.checkpoints').install_loader()


when_imported(
    'mmengine',
    _register,
    failure='polynext_mm could not be registered with mmengine, which works without it: run '
    '`polynext-mm doctor` to see why',
)
