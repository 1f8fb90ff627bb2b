"""The OpenMMLab packages underneath: are they there, and do they have their operators?"""

from .install import install_mmcv_ops
from .packages import check_stack, stack_name

__all__ = ['check_stack', 'install_mmcv_ops', 'stack_name']
