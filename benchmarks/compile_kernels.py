"""Compile the Triton kernels for GPUs that need not be there: registers, spills, shared memory.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --targets sm_80 sm_90 sm_100 gfx942 --dtypes bfloat16

A kernel that needs more registers than there are keeps values in the memory of each thread and is
slow; its registers and shared memory together say how many programs a processor holds. Triton's
wheel brings all that it takes. Heads are 32 wide, and strides are multiples of 16, as in a network.
"""

import argparse
import itertools
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


def parse_target(name: str) -> GPUTarget:
    """Return Triton's target of a device, sm_90 or gfx942, say."""
    if re.fullmatch(r'sm_\d+', name):
        return GPUTarget('cuda', int(name.removeprefix('sm_')), 32)
    if re.fullmatch(r'gfx[0-9a-f]+', name):  # RDNA (gfx10 and up) has waves of 32
        return GPUTarget('hip', name, 32 if name.startswith('gfx1') else 64)
    raise argparse.ArgumentTypeError(f'{name!r} is no target: write sm_90 or gfx942, say')


def usage(kernel: str, dtype: str, tile: Tile, target: GPUTarget) -> Record:
    """Compile a kernel and tell what it takes of the device.

    Args:
        kernel: Its name in KERNELS.
        dtype: A key of DTYPES.
        tile: A tile of TILES.
        target: The device.
    """
    function = KERNELS[kernel]
    element, _, precision = DTYPES[dtype]
    constants = dict(
        EPS=1e-12,
        PRECISION=precision,
        WIDTH=WIDTH,
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        STAGES=tile.stages,
    )
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name.endswith('_ptr'):
            signature[name] = '*fp32' if name in ('factor_ptr', 'shift_ptr') else f'*{element}'
        else:
            signature[name] = 'i32'
        if name.endswith('_ptr') or '_stride_' in name:
            aligned[(index,)] = [['tt.divisibility', 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=target,
        options=dict(num_warps=tile.warps),
    )
    nvidia = target.backend == 'cuda'
    registers, spilled = (nvidia_registers if nvidia else amd_registers)(compiled)
    code = compiled.asm['ptx' if nvidia else 'amdgcn']
    return {
        'target': f'sm_{target.arch}' if nvidia else target.arch,
        'dtype': dtype,
        'kernel': kernel,
        'tile': f'{tile.queries}x{tile.keys}',
        'warps': tile.warps,
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
    return [
        usage(kernel, dtype, tile, target)
        for target, dtype, kernel in itertools.product(targets, dtypes, kernels)
        for tile in TILES[kernel][DTYPES[dtype][1]]
    ]


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
    parser.add_argument('--kernels', nargs='+', choices=KERNELS, default=list(KERNELS))
    args = parser.parse_args()
    print(markdown(report(args.targets, args.dtypes, args.kernels)))


if __name__ == '__main__':
    main()
