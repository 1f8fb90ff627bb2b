"""PolyNeXt backbones for OpenMMLab: importing this registers everything.

``custom_imports = dict(imports=['polynext_mm'], allow_failed_imports=False)`` in a config is all that
another project needs.
"""

from .compat import check_stack, install_mmcv_ops

check_stack()
install_mmcv_ops()

from .backbones import MetaFormer, PolyNeXt  # noqa: E402 - the stack underneath must be whole first
from .engine import *  # noqa: E402, F401, F403
from .weights import install_loader  # noqa: E402

install_loader()

__all__ = ['MetaFormer', 'PolyNeXt']
__version__ = '0.1.0'
