"""Files that somebody made on purpose: pickles that run code, and what is no weight."""

from __future__ import annotations

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


def weights_and(value: bytes, protocol: int = 2) -> bytes:
    """A pickle of a dict with something in it, which is pushed by ``value``."""
    return b'\x80' + bytes([protocol]) + b'}' + text('stem.weight') + value + b's.'


def archive(path: Path, pickled: bytes, members: dict[str, bytes] | None = None) -> None:
    """Write an archive as torch's are, around any pickle."""
    with zipfile.ZipFile(path, 'w') as file:
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
