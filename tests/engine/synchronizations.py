"""See where the host waits for a device."""

import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operators whose result the host needs: a number, or the shape of an output.
_WAITING = {'_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'masked_select', 'unique_dim'}
_WAITING |= {'_unique2', 'unique_consecutive', 'bincount'}
_COPIES = {'_to_copy', 'copy_'}
_TORCH = str(Path(torch.__file__).parent)


class Synchronizations(TorchDispatchMode):
    """Record operations that would make the host wait, in ``all``, as pairs of name and file.

    On the CPU every tensor counts as one of a device but those of ``on_host``, so a training on the
    CPU shows what it would wait for on a GPU, kernels that only one of them takes excepted.

    Args:
        device: The type of the device that would be waited for.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.all: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = func._schema.name.partition('::')[2]
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(t.device.type == self.device for t in tensors) and (
            name in _WAITING or self._indexes(name, tensors) or self._leaves(name, tensors, out)
        ):
            self.all.append((name, _caller()))
        return out

    @staticmethod
    def _indexes(name, tensors) -> bool:
        """A mask as an index has to be counted."""
        masks = [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)]
        return name in ('index', 'index_put', 'index_put_') and bool(masks)

    def _leaves(self, name, tensors, out) -> bool:
        return name in _COPIES and self.device != 'cpu' and out.device.type == 'cpu'


def _caller() -> str:
    """Return the innermost file that is not torch's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith(_TORCH):
            return f'{frame.filename}:{frame.name}'
    return ''
