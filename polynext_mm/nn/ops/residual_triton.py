"""The end of a branch as a Triton kernel, for CUDA and ROCm devices: the sum, twice.

``x + keep * branch`` is written as it is, and again in the dtype of the next branch's products,
which would otherwise take a separate pass over the map.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_operators

PLACES = 1024  # of a program
WARPS = 4


def supports(x: Tensor, branch: Tensor, keep: 'Tensor | None', out: Tensor, narrow: Tensor) -> bool:
    """Return whether the kernel supports these maps (..., C), with one factor per sample."""
    return (
        triton_operators.takes(x, branch, keep, out, narrow)
        and x.numel() > 0
        and x.shape == branch.shape == out.shape == narrow.shape
        and (keep is None or x.numel() % keep.numel() == 0)
    )


@triton.jit(do_not_specialize=['per_sample', 'n_places'])
def _add_branch_kernel(
    x_ptr,
    branch_ptr,
    keep_ptr,
    out_ptr,
    narrow_ptr,
    per_sample,
    n_places,
    PLACES: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    valid = places < n_places
    total = tl.load(branch_ptr + places, mask=valid, other=0.0).to(tl.float32)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + places // per_sample, mask=valid, other=0.0)
        total = total * keep.to(tl.float32)
    total += tl.load(x_ptr + places, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(narrow_ptr + places, total.to(narrow_ptr.dtype.element_ty), mask=valid)


#: By the name in benchmarks/compile_kernels.py.
KERNELS = {'add_branch': _add_branch_kernel}


@triton_operators.operator(
    'add_branch_triton(Tensor x, Tensor branch, Tensor? keep, Tensor(a!) out, Tensor(b!) narrow)'
    ' -> ()',
    lambda x, branch, keep, out, narrow: None,
)
def add_branch(
    x: Tensor, branch: Tensor, keep: 'Tensor | None', out: Tensor, narrow: Tensor
) -> None:
    """Compute ``out = narrow = x + keep * branch``."""
    per_sample = x.numel() // (1 if keep is None else keep.numel())
    with torch.cuda.device_of(x):
        _add_branch_kernel[(triton.cdiv(x.numel(), PLACES),)](
            *(x, branch, keep, out, narrow, per_sample, x.numel()), PLACES=PLACES, num_warps=WARPS
        )
    for written in (out, narrow):
        torch.autograd.graph.increment_version(written)
