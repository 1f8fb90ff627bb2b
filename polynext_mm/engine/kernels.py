"""Check the Triton kernels on this machine before a training relies on them."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..nn import kernel_check
from ..nn.ops import dispatch
from .processes import on_main


@HOOKS.register_module()
class KernelCheckHook(Hook):
    """Compare the Triton kernels with torch's operations before the first training on a machine.

    The main process does it, in float32 and in the dtype of the training; what passed is remembered
    on disk (:mod:`polynext_mm.nn.kernel_check`). A kernel that is wrong or does not compile gives
    a warning, and training continues with torch's operations in its place, in all processes.
    ``kernels.txt`` in the folder of the log says what was found.

    Args:
        kernels: 'checked', 'unchecked' or 'off', which uses torch's operations everywhere. The
            environment variable POLYNEXT_KERNELS takes precedence.

    Raises:
        ValueError: For another value.
    """

    # before anything is computed or captured
    priority = 'VERY_HIGH'

    def __init__(self, kernels: str = 'checked'):
        self.kernels = dispatch.kernel_mode(kernels)

    def before_train(self, runner: Runner) -> None:
        device = next(runner.model.parameters()).device
        if not kernel_check.available(device):
            return
        lines = []
        if self.kernels == 'checked':
            dtypes = (_dtype_of(runner), torch.float32)
            result = on_main(lambda: kernel_check.check(device, dtypes))
            refused = result.refused()
            runner.logger.info(result.text)
            lines += [result.text, *map(str, result.findings)]
            for finding in result.findings:
                runner.logger.warning(
                    f"{finding}: training goes on with torch's operations instead of this module's"
                )
        else:
            refused = list(kernel_check.MODULES) if self.kernels == 'off' else []
        dispatch.refuse_triton(refused)
        lines.append(f'replaced by operations of torch: {", ".join(refused) or "none"}')
        if dist.is_main_process():
            (Path(runner.log_dir) / 'kernels.txt').write_text('\n'.join(lines) + '\n')


def _dtype_of(runner: Runner) -> torch.dtype:
    """Return the dtype of products in a training."""
    wrapper = runner.optim_wrapper
    dtype = getattr(wrapper, 'cast_dtype', None)
    if dtype is None and isinstance(wrapper, AmpOptimWrapper):
        return torch.float16  # autocast's own choice
    return dtype or next(runner.model.parameters()).dtype
