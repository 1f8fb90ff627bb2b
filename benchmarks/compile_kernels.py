"""Compile the Triton kernels without a GPU, and report registers, spills and shared memory.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --targets sm_80 sm_90 sm_100 gfx942 --dtypes bfloat16

A kernel that needs more registers than there are spills to memory and is slow; registers and shared
memory together limit how many programs a processor holds. Triton's wheel contains all that is
needed. Heads are 32 wide, and strides are multiples of 16, as in a network.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polynext_mm.nn.ops import depthwise_triton, norms_triton, partners_triton, residual_triton
from polynext_mm.nn.ops.poly_attention_triton import KERNELS, TILES, Tile
from report import Record, markdown

WIDTH = 32
# The precision of float32 products is torch's setting (allow_tf32).
DTYPES = {
    'bfloat16': ('bf16', 'half', 'ieee'),
    'float16': ('fp16', 'half', 'ieee'),
    'float32': ('fp32', 'ieee', 'ieee'),
    'tf32': ('fp32', 'tf32', 'tf32'),
}
# What multiplies matrices, the fastest first.
PRODUCTS = ('tcgen05.mma', 'wgmma', 'mma.sync', 'mfma', 'wmma')

# The kernels of the branches, at the widths of CPolyNeXt-S and with the kernel sizes that it has
# there. Under autocast the residual stream and the weights of norms are float32, as sums are.
INNER = ((72, 3), (144, 5), (216, 5), (324, 5))
NORMED = {'product': (72, 144, 252, 378), 'add': (72, 144, 288, 432), 'sum': (72, 144, 288, 432)}
WIDE = {'part_ptr', 'mean_ptr', 'rstd_ptr', 'keep_ptr', 'weight_ptr', 'a0_ptr', 'a1_ptr'}
STREAM = {
    'add': {'x_ptr', 'out_ptr', 'grad_ptr', 'plus_ptr'},
    'add_branch': {'x_ptr', 'out_ptr'},
    'sum': {'s0_ptr', 's1_ptr', 'out_ptr', 'total_ptr', 'grad_ptr', 'grad_s0_ptr', 'grad_s1_ptr'},
}
BRANCHES = ('convolve', 'weight_grad', 'times_swapped', 'add_branch', *NORMED)


def parse_target(name: str) -> GPUTarget:
    """Return Triton's target of a device, sm_90 or gfx942, say."""
    if re.fullmatch(r'sm_\d+', name):
        return GPUTarget('cuda', int(name.removeprefix('sm_')), 32)
    if re.fullmatch(r'gfx[0-9a-f]+', name):  # RDNA (gfx10 and up) has waves of 32
        return GPUTarget('hip', name, 32 if name.startswith('gfx1') else 64)
    raise argparse.ArgumentTypeError(f'{name!r} is no target: write sm_90 or gfx942, say')


def usage(kernel: str, dtype: str, tile: Tile, target: GPUTarget) -> Record:
    """Compile a kernel of attention and tell what it takes of the device.

    Args:
        kernel: Its name in KERNELS.
        dtype: A key of DTYPES.
        tile: A tile of TILES.
        target: The device.
    """
    constants = dict(
        EPS=1e-12,
        PRECISION=DTYPES[dtype][2],
        WIDTH=WIDTH,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        STAGES=tile.stages,
    )
    wide, shown = {'factor_ptr', 'shift_ptr'}, f'{tile.queries}x{tile.keys}'
    return _usage(kernel, KERNELS[kernel], shown, dtype, constants, wide, tile.warps, target)


def branch_usages(kernel: str, dtype: str, target: GPUTarget) -> Iterator[Record]:
    """Compile a kernel of the branches, one of BRANCHES, at the widths of CPolyNeXt-S."""
    if kernel in NORMED:
        for width in NORMED[kernel]:
            tile = norms_triton.tile(width)
            warps = tile.pop('num_warps')
            wide = WIDE | STREAM.get(kernel, set())
            for function, name in zip(norms_triton.KERNELS[kernel], (kernel, f'{kernel}_grad')):
                constants = dict(tile, EPS=norms_triton.LN_EPS)
                yield _usage(name, function, f'C={width}', dtype, constants, wide, warps, target)
        return
    if kernel == 'add_branch':
        function, wide = residual_triton.KERNELS[kernel], WIDE | STREAM[kernel]
        constants = dict(PLACES=residual_triton.PLACES)
        yield _usage(
            *(kernel, function, 'any C', dtype, constants, wide, residual_triton.WARPS, target)
        )
        return
    for channels, size in INNER:
        shown = f'C={channels} {size}x{size}'
        constants = dict(CHANNELS=channels, SIZE=size, DILATION=2, ROTATED=False)
        if kernel == 'convolve':
            tile = dict(zip(('ROWS', 'PLACES'), depthwise_triton.TILE))
            yield _usage(
                *(kernel, depthwise_triton.KERNELS[kernel], shown, dtype, constants | tile),
                *(set(), depthwise_triton.WARPS, target),
            )
        elif kernel == 'weight_grad':
            tile = dict(zip(('POSITIONS', 'BLOCK'), depthwise_triton.STEP))
            yield _usage(
                *(kernel, depthwise_triton.KERNELS[kernel], shown, dtype, constants | tile),
                *(WIDE, depthwise_triton.WARPS, target),
            )
        else:
            constants = dict(CHANNELS=channels, PLACES=partners_triton.PLACES)
            for name, function in partners_triton.KERNELS.items():
                yield _usage(
                    *(name, function, f'C={channels}', dtype, constants, set()),
                    *(partners_triton.WARPS, target),
                )


def _usage(kernel, function, shown, dtype, constants, wide, warps, target) -> Record:
    """Compile a function and tell what it takes; pointers named in ``wide`` are to float32."""
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name.endswith('_ptr'):
            signature[name] = '*fp32' if name in wide else f'*{DTYPES[dtype][0]}'
        else:
            signature[name] = 'i32'
        if name.endswith('_ptr') or '_stride_' in name:
            aligned[(index,)] = [['tt.divisibility', 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=target,
        options=dict(num_warps=warps),
    )
    nvidia = target.backend == 'cuda'
    registers, spilled = (nvidia_registers if nvidia else amd_registers)(compiled)
    code = compiled.asm['ptx' if nvidia else 'amdgcn']
    return {
        'target': f'sm_{target.arch}' if nvidia else target.arch,
        'dtype': dtype,
        'kernel': kernel,
        'tile': shown,
        'warps': warps,
        'registers': registers,
        'spilled': spilled,
        'shared KiB': compiled.metadata.shared / 1024,
        'products': next((name for name in PRODUCTS if name in code), 'scalar'),
    }


def nvidia_registers(compiled) -> tuple[int, int]:
    """Return registers of a thread, and bytes that it keeps in memory."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name]
        text = subprocess.check_output(command, text=True)
    return tuple(int(re.search(rf'{name}:(\d+)', text)[1]) for name in ('REG', 'STACK'))


def amd_registers(compiled) -> tuple[int, int]:
    """Return vector registers of a lane, and how many it keeps in memory."""
    code = compiled.asm['amdgcn']
    return tuple(
        int(re.search(rf'\.{name}:\s+(\d+)', code)[1])
        for name in ('vgpr_count', 'vgpr_spill_count')
    )


def report(targets: list[GPUTarget], dtypes: list[str], kernels: list[str]) -> list[Record]:
    """Compile every tile that may be chosen."""
    records = []
    for target, dtype, kernel in itertools.product(targets, dtypes, kernels):
        if kernel in KERNELS:
            tiles = TILES[kernel][DTYPES[dtype][1]]
            records += [usage(kernel, dtype, tile, target) for tile in tiles]
        elif dtype != 'tf32':  # there are no products in these
            records += branch_usages(kernel, dtype, target)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--targets',
        nargs='+',
        type=parse_target,
        metavar='TARGET',
        default=[parse_target('sm_80'), parse_target('sm_90')],
        help='devices, as NVIDIA and AMD name them (default: sm_80 sm_90)',
    )
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES))
    names = [*KERNELS, *BRANCHES]
    parser.add_argument('--kernels', nargs='+', choices=names, default=names)
    args = parser.parse_args()
    print(markdown(report(args.targets, args.dtypes, args.kernels)))


if __name__ == '__main__':
    main()
