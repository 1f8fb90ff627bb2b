"""Files that somebody made on purpose: pickles that call things, and files that claim too much.

``CODE`` holds pickles that would run code or break the interpreter; ``BOMBS`` writes files that are
small and claim to be large. The tests use both, and a program of its own measures the memory.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

EXECUTED = 'executed by the file'


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return eval, (f'open({self.trace!r}, "w").write({EXECUTED!r})',)


def text(value: str) -> bytes:
    """The operation that pushes a text."""
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """The operation that pushes a function or class."""
    return f'c{module}\n{attribute}\n'.encode()


def weights_and(value: bytes) -> bytes:
    """A pickle of a dict with something in it, which is pushed by ``value``."""
    return b'\x80\x02}' + text('stem.weight') + value + b's.'


def archive(
    path: Path,
    pickled: bytes,
    members: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write an archive as torch's are, around any pickle."""
    with zipfile.ZipFile(path, 'w', compression) as file:
        file.writestr('archive/data.pkl', pickled)
        file.writestr('archive/byteorder', b'little')
        file.writestr('archive/version', b'3\n')
        for key, data in (members or {}).items():
            file.writestr(f'archive/data/{key}', data)


def older(path: Path, pickled: bytes, keys: list[str], data: bytes) -> None:
    """Write a file in torch's older format, around any pickle."""
    machine = dict(protocol_version=1001, little_endian=True, type_sizes={})
    parts = [0x1950A86A20F9469CFC6C, 1001, machine]
    head = b''.join(pickle.dumps(part, 2) for part in parts)
    pickled = pickled.replace(b'tQ', b'NtQ')  # of a view of the storage, there is none
    path.write_bytes(head + pickled + pickle.dumps(keys, 2) + data)


def storage(size: int, key: str = '0', kind: str = 'FloatStorage') -> bytes:
    """The operations that push a storage."""
    reference = text('storage') + name('torch', kind) + text(key) + text('cpu') + number(size)
    return b'(' + reference + b'tQ'


def number(value: int) -> bytes:
    data = value.to_bytes(9, 'little', signed=True)
    return b'\x8a' + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b'(' + b''.join(map(number, values)) + b't'


def tensor(size: int, shape: tuple, stride: tuple, offset: int = 0, **settings) -> bytes:
    """The operations that push a tensor."""
    view = storage(size, **settings) + number(offset) + numbers(*shape) + numbers(*stride)
    hooks = name('collections', 'OrderedDict') + b')R'
    return name('torch._utils', '_rebuild_tensor_v2') + b'(' + view + b'\x89' + hooks + b'tR'


def _call(module: str, attribute: str, *arguments: str) -> bytes:
    return name(module, attribute) + b'(' + b''.join(map(text, arguments)) + b'tR'


# Pickles that run code, reach for it, or crash the interpreter, as values of a dict.
CODE = {
    'eval': _call('builtins', 'eval', '1'),
    'eval of Python 2': _call('__builtin__', 'eval', '1'),
    'exec': _call('builtins', 'exec', 'pass'),
    'import': _call('builtins', '__import__', 'os'),
    'os.system': _call('os', 'system', 'true'),
    'posix.system': _call('posix', 'system', 'true'),
    'subprocess': _call('subprocess', 'check_output', 'true'),
    'by stack': text('os') + text('system') + b'\x93(' + text('true') + b'tR',
    'by attribute path': text('torch') + text('os.system') + b'\x93(' + text('true') + b'tR',
    'old class': b'(' + text('true') + b'ios\nsystem\n',
    'object': b'(' + name('os', 'system') + text('true') + b'o',
    'new object': name('subprocess', 'Popen') + b'(' + text('true') + b't\x81',
    'new object with keywords': name('subprocess', 'Popen') + b')}\x92',
    'extension': b'\x82\x01',
    'getattr of a dict': name('builtins', 'getattr') + b'(}' + text('get') + b'tR',
    'getattr of a class': (
        name('builtins', 'getattr')
        + b'('
        + name('collections', 'OrderedDict')
        + text('pop')
        + b'tR'
    ),
    'call of a method': (
        name('builtins', 'getattr')
        + b'('
        + name('mmengine.logging.history_buffer', 'HistoryBuffer')
        + text('__init__')
        + b'tR)R'
    ),
    'torch.load': _call('torch', 'load', '/dev/null'),
    'torch.hub': _call('torch.hub', 'load', 'a/b', 'c'),
    'torch.jit': _call('torch.jit', 'load', '/dev/null'),
    'reconstructor': (
        name('copy_reg', '_reconstructor')
        + b'('
        + name('os', '_wrap_close')
        + name('builtins', 'object')
        + b'NtR'
    ),
    'partial': name('functools', 'partial') + b'(' + name('os', 'system') + b'tR',
    'attributes of a class': name('argparse', 'Namespace') + b'}' + text('x') + b'K\x01sb',
    'attributes of a function': name('torch._utils', '_rebuild_tensor') + b'}' + text('x') + b'Nsb',
    'attributes of a tensor': tensor(1, (1,), (1,)) + b'}' + text('grad_fn') + b'Nsb',
    'a function alone': name('torch._utils', '_rebuild_tensor_v2'),
    'a class alone': name('argparse', 'ArgumentParser'),
    'array of objects': (
        name('numpy._core.multiarray', 'scalar')
        + b'('
        + name('numpy', 'dtype')
        + b'('
        + text('O8')
        + b'\x89\x88tR'
        + b'C\x08AAAAAAAA'
        + b'tR'
    ),
    'dtype with fields': (
        name('numpy', 'dtype')
        + b'('
        + text('V8')
        + b'\x89\x88tR('
        + b'K\x03'
        + text('|')
        + b'N(t}K\x08K\x01K\x10tb'
    ),
    'dtype changed': (
        name('numpy', 'dtype')
        + b'('
        + text('f8')
        + b'\x89\x88tR('
        + b'K\x03'
        + text('>')
        + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    ),
    'array beyond its bytes': (
        name('numpy._core.multiarray', '_reconstruct')
        + b'('
        + name('numpy', 'ndarray')
        + b'K\x00\x85C\x01btR'
        + b'(K\x01'
        + numbers(10**9)
        + name('numpy', 'dtype')
        + b'('
        + text('f8')
        + b'\x89\x88tR'
        + b'\x89C\x08AAAAAAAAtb'
    ),
    'reference to code': b'(' + text('module') + name('os', 'system') + text('x') + b'tQ',
    'text as a reference': text('storage') + b'Q',
}


def _laughs(depth: int) -> bytes:
    """A tuple of two of a tuple of two of ...: short to write, without end to walk through."""
    return b')' + b''.join(b'q\x01h\x01h\x01\x86' for _ in range(depth))


def _header(tensors: dict, data: bytes = b'') -> bytes:
    head = json.dumps(tensors).encode()
    return struct.pack('<Q', len(head)) + head + data


# Small files that claim to be large: what writes each of them.
BOMBS = {
    'deflated weights': lambda path: archive(
        path,
        weights_and(tensor(1 << 26, (1 << 26,), (1,))),
        {'0': bytes(1 << 28)},
        zipfile.ZIP_DEFLATED,
    ),
    'deflated pickle': lambda path: archive(
        path, weights_and(text('x' * (1 << 28))), compression=zipfile.ZIP_DEFLATED
    ),
    'stride 0': lambda path: archive(
        path, weights_and(tensor(1, (1 << 31,), (0,))), {'0': bytes(4)}
    ),
    'overlapping rows': lambda path: archive(
        path, weights_and(tensor(1 << 10, (1 << 20, 1 << 10), (0, 1))), {'0': bytes(1 << 12)}
    ),
    'more than the storage': lambda path: archive(
        path, weights_and(tensor(4, (1 << 31,), (1,))), {'0': bytes(16)}
    ),
    'beyond the storage': lambda path: archive(
        path, weights_and(tensor(4, (4,), (1,), 1 << 40)), {'0': bytes(16)}
    ),
    'steps beyond the storage': lambda path: archive(
        path, weights_and(tensor(4, (2, 2), (1 << 33, 1))), {'0': bytes(16)}
    ),
    'negative side': lambda path: archive(
        path, weights_and(tensor(4, (-(1 << 31), -(1 << 31)), (1, 1))), {'0': bytes(16)}
    ),
    'storage that is not there': lambda path: archive(
        path, weights_and(tensor(1 << 33, (1 << 33,), (1,)))
    ),
    'storage larger than its member': lambda path: archive(
        path, weights_and(tensor(1 << 33, (1 << 33,), (1,))), {'0': bytes(16)}
    ),
    'members that overlap': lambda path: _overlapping(path, 2000),
    'older, storage of 2^40': lambda path: older(
        path,
        weights_and(tensor(1 << 40, (1 << 40,), (1,))),
        ['0'],
        struct.pack('<q', 1 << 40) + bytes(16),
    ),
    'older, negative storage': lambda path: older(
        path, weights_and(tensor(4, (4,), (1,))), ['0'], struct.pack('<q', -4) + bytes(16)
    ),
    'bytes of a number': lambda path: archive(
        path, weights_and(name('builtins', 'bytearray') + b'(' + number(1 << 40) + b'tR')
    ),
    'storage by its class': lambda path: archive(
        path, weights_and(name('torch', 'FloatStorage') + b'(' + number(1 << 40) + b'tR')
    ),
    'tensor by its class': lambda path: archive(
        path, weights_and(name('torch', 'FloatTensor') + b'(' + number(1 << 40) + b'tR')
    ),
    'text of 2^60': lambda path: archive(
        path, weights_and(b'\x8d' + struct.pack('<Q', 1 << 60) + b'abc')
    ),
    'bytes of 2^60': lambda path: archive(
        path, weights_and(b'\x8e' + struct.pack('<Q', 1 << 60) + b'abc')
    ),
    'place 2^31 in the memory': lambda path: archive(
        path, weights_and(b'Nr' + struct.pack('<I', (1 << 32) - 1))
    ),
    'tuples of tuples': lambda path: archive(path, weights_and(_laughs(60))),
    'nested without end': lambda path: archive(path, weights_and(b'N' + b'\x85' * 500_000)),
    'nested in a list': lambda path: archive(path, weights_and(b']' * 100_000 + b'a' * 99_999)),
    'a list in itself': lambda path: archive(path, weights_and(b']q\x01h\x01a')),
    'millions of lists': lambda path: archive(path, weights_and(b'](' + b']' * 3_000_000 + b'e')),
    'lists beside a weight': lambda path: archive(
        path, _weight_and(b'](' + b']' * 3_000_000 + b'e'), {'0': bytes(16)}
    ),
    'lists in a list': lambda path: archive(
        path, _weight_and(b'](' + b']' * 11_000_000 + b'e'), {'0': bytes(16)}
    ),
    'dicts of a list': lambda path: archive(
        path, _weight_and(b'](' + b'}' * 3_000_000 + b'e'), {'0': bytes(16)}
    ),
    'tuples of what is there': lambda path: archive(
        path, _weight_and(b'](' + b'N\x85' * 2_000_000 + b'e'), {'0': bytes(16)}
    ),
    'tensors of one storage': lambda path: archive(path, _many_tensors(200_000), {'0': bytes(16)}),
    'texts': lambda path: archive(
        path, _weight_and(b'](' + text('a') * 1_000_000 + b'e'), {'0': bytes(16)}
    ),
    'older, lists beside a weight': lambda path: older(
        path,
        _weight_and(b'](' + b']' * 3_000_000 + b'e'),
        ['0'],
        (4).to_bytes(8, 'little') + bytes(16),
    ),
    'older, lists for the machine': lambda path: path.write_bytes(
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + b'\x80\x02]('
        + b']' * 3_000_000
        + b'e.'
    ),
    'safetensors, header of 2^60': lambda path: path.with_suffix('.safetensors').write_bytes(
        struct.pack('<Q', 1 << 60) + b'{}'
    ),
    'safetensors, shape of 2^40': lambda path: path.with_suffix('.safetensors').write_bytes(
        _header({'a': dict(dtype='F32', shape=[1 << 40], data_offsets=[0, 16])}, bytes(16))
    ),
    'safetensors, beyond the end': lambda path: path.with_suffix('.safetensors').write_bytes(
        _header({'a': dict(dtype='F32', shape=[1 << 38], data_offsets=[0, 1 << 40])}, bytes(16))
    ),
    'safetensors, the same data twice': lambda path: path.with_suffix('.safetensors').write_bytes(
        _header(
            {key: dict(dtype='F32', shape=[4], data_offsets=[0, 16]) for key in map(str, range(9))},
            bytes(16),
        )
    ),
}


def _weight_and(value: bytes) -> bytes:
    """A pickle of a dict with a weight that can be read, and something else."""
    weight = text('stem.weight') + tensor(4, (4,), (1,)) + b's'
    return b'\x80\x02}' + weight + text('more') + value + b's.'


def _many_tensors(count: int) -> bytes:
    """A pickle of as many tensors, each of three operations: all have the same arguments."""
    view = storage(4) + number(0) + numbers(4) + numbers(1)
    hooks = name('collections', 'OrderedDict') + b')R'
    function = name('torch._utils', '_rebuild_tensor_v2') + b'q\x01'
    arguments = b'(' + view + b'\x89' + hooks + b'tq\x02'
    return (
        b'\x80\x02}'
        + text('stem.weight')
        + function
        + arguments
        + b'R'
        + b's'
        + (text('more') + b'](' + b'h\x01h\x02R' * count + b'es.')
    )


def _overlapping(path: Path, count: int) -> None:
    """Write an archive whose directory names one member's data many times."""
    size = 1 << 20
    view = (size // 4, (size // 4,), (1,))
    items = b''.join(text(f'w.{i}') + tensor(*view, key=str(i)) + b's' for i in range(count))
    archive(path, b'\x80\x02}' + items + b'.', {'0': bytes(size)})
    content = path.read_bytes()
    start, end = content.index(b'PK\x01\x02'), content.rindex(b'PK\x05\x06')
    entry = content[content.rindex(b'PK\x01\x02') : end]
    directory = content[start:end]
    for i in range(1, count):
        name_of_it = f'archive/data/{i}'.encode()
        directory += entry[:28] + struct.pack('<H', len(name_of_it)) + entry[30:46] + name_of_it
    counts = (count + 3, count + 3, len(directory), start, 0)
    path.write_bytes(
        content[:start] + directory + struct.pack('<4sHHHHIIH', b'PK\x05\x06', 0, 0, *counts)
    )


def _honest(path: Path) -> None:
    torch.save({'stem.weight': torch.ones(1 << 24)}, path)


def bomb(kind: str, folder: Path) -> Path:
    """Write one of the bombs, or an honest file of 64 MB; return its path."""
    path = folder / 'bomb.pt'
    BOMBS.get(kind, _honest)(path)
    return path if path.exists() else path.with_suffix('.safetensors')


def odd_weights(like: torch.Tensor) -> dict[str, object]:
    """What must not be loaded as a weight of the shape of ``like``, by what it is."""
    huge, broken, infinite = like.double(), like.clone(), like.clone()
    huge.view(-1)[0] = 1e300
    broken.view(-1)[-1] = float('nan')
    infinite.view(-1)[0] = float('-inf')
    return {
        'int': like.to(torch.int64),
        'int32': like.to(torch.int32),
        'uint8': like.to(torch.uint8),
        'bool': like > 0,
        'complex': like.to(torch.complex64),
        'nan': broken,
        'inf': infinite,
        'beyond float32': huge,
        'meta': like.to('meta'),
        'sparse': like.to_sparse(),
        'quantized': torch.quantize_per_tensor(like, 0.1, 0, torch.qint8),
        'NumPy array': like.numpy(),
        'list': like.flatten().tolist(),
        'text': 'weights',
        'number': 1.5,
        'None': None,
    }
