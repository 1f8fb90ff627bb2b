"""Checkpoint files: fetched, read without executing anything, brought to one form.

The form is mmengine's: ``dict(state_dict=..., meta=...)`` and whatever else an mm checkpoint holds, the
keys of the backbone behind ``backbone.``, in the names of whoever wrote the file. Names are translated
where the arch is known: on loading (:mod:`polynext_mm.weights.loading`).
"""

import argparse
import contextlib
import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

from . import names
from .published import PUBLISHED

UNSAFE = 'unsafe:'
BACKBONE = 'backbone.'
# where the authors' reader looks for weights, an average first
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema')
_WEIGHTS = ('state_dict', 'model')


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used as asked. The message names it and says what to do."""


def read(source: str | os.PathLike, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint and bring it to the one form.

    Args:
        source: Path or http(s) url of a .pt, .pth or .safetensors file: the authors', in any container
            that their release reads or writes, or one of ours.
        map_location: As of ``torch.load``.

    Returns:
        dict: With ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be fetched, is damaged, needs code to be executed, or holds no
            weights.
    """
    path = fetch(str(source)) if is_url(source) else Path(source).expanduser()
    return normalize(_load(path, map_location), path)


def is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(('http://', 'https://'))


def cached_path(url: str) -> Path:
    """Where a downloaded file is kept: torch.hub's directory, as mmengine does."""
    return Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name


def fetch(url: str) -> Path:
    """The local copy of ``url``, downloaded once for all processes of a node.

    Raises:
        CheckpointError: On every rank, if it could not be downloaded on any.
    """
    path = cached_path(url)
    failure = None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not path.exists() and (not distributed or int(os.environ.get('LOCAL_RANK', 0)) == 0):
        failure = _download(url, path)
    if distributed:
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
        failure = next(filter(None, failures), None)
    if failure:
        raise CheckpointError(
            f'could not download {url} ({failure}). Put the file at {path}, or give its path in place '
            'of the url; to start from scratch instead, set the init_cfg of the backbone to None'
        )
    return path


def _download(url: str, path: Path) -> str | None:
    """Download to ``path``, whole or not at all; return what went wrong."""
    partial = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), progress=False)
        if path.suffix in ('.pt', '.pth') and not _may_be_whole(partial):
            return 'what arrived is not a whole checkpoint'
        os.replace(partial, path)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        return f'{type(error).__name__}: {error}'
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return None


def _may_be_whole(path: Path) -> bool:
    """Whether a file is a whole archive of torch's, or of the older kind, which does not tell."""
    with open(path, 'rb') as file:
        return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == pickle.PROTO)


def _history_buffer_attribute(owner: Any, name: str) -> Any:
    """Stands for ``getattr`` in pickled HistoryBuffers, which refer to their own methods with it."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer and not isinstance(owner, HistoryBuffer):
        raise pickle.UnpicklingError(f'getattr of {owner!r} is not a HistoryBuffer statistic')
    return getattr(owner, name)


def _harmless() -> list:
    """What checkpoints hold besides tensors, and what reading it runs no code of the file's."""
    from mmengine.logging import HistoryBuffer

    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = {
        type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['AllFloat']
    }
    allowed = [
        argparse.Namespace,
        HistoryBuffer,
        slice,
        np.ndarray,
        np.dtype,
        type(np.dtype(bool)),
        type(np.dtype(str)),
        *dtypes,
        (_history_buffer_attribute, 'builtins.getattr'),
    ]
    for core in ('numpy.core', 'numpy._core'):  # NumPy 1's name and NumPy 2's
        allowed += [
            (multiarray.scalar, f'{core}.multiarray.scalar'),
            (multiarray._reconstruct, f'{core}.multiarray._reconstruct'),
        ]
    return allowed


def _load(path: Path, map_location: Any) -> Any:
    """``torch.load`` that executes nothing and explains what it refuses."""
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {path}: check the path (it is taken from '
            f'{Path.cwd()} if it is relative)'
        )
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # noqa: BLE001 - damage shows in many ways, all the same to the reader
        refused = _refused(error)
        if refused:
            raise CheckpointError(
                f'{path} holds more than weights and was not read, since reading all of it could '
                f'execute code: {refused}\nIf you trust whoever made it, read it the way mmengine '
                f'does: {UNSAFE}{path}'
            ) from error
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is damaged, truncated or no checkpoint: '
            f'{type(error).__name__}: {reason}. Delete it and get it again'
        ) from error


def _refused(error: Exception) -> str | None:
    """What a file holds that is not read, out of torch's long explanation; None if that is not it."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    marks = ('GLOBAL', 'getattr', 'unrecognized function', 'Can only')
    return next(
        (line.strip() for line in str(error).splitlines() if any(mark in line for mark in marks)),
        None,
    )


def normalize(checkpoint: Any, source: str | os.PathLike) -> dict:
    """Bring what a file holds to the one form. ``source`` is named in errors, here and on loading.

    Raises:
        CheckpointError: If there are no weights in it.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    if isinstance(checkpoint.get('meta'), Mapping):
        # mm keeps an average, if there is one, under state_dict itself
        whole = dict(checkpoint)
        # mmengine would execute the config of an old checkpoint on resuming
        whole['meta'] = {k: v for k, v in checkpoint['meta'].items() if k != 'config'}
        weights = checkpoint.get('state_dict')
    else:
        whole = {'meta': {}}
        weights = _weights_of(checkpoint)
    weights = (
        {unwrapped(key): value for key, value in weights.items() if isinstance(key, str)}
        if isinstance(weights, Mapping)
        else {}
    )
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f'{source} holds no weights: its keys are {", ".join(map(str, list(checkpoint)[:8]))}'
        )
    if is_backbone(weights):
        weights = {BACKBONE + key: value for key, value in weights.items()}
    state_dict = OrderedDict(weights)
    # the loader hands this to the backbone, whose errors and report can then name the file
    state_dict._metadata = {prefix: {'source': str(source)} for prefix in ('', BACKBONE[:-1])}
    whole['state_dict'] = state_dict
    return whole


def is_backbone(keys) -> bool:
    """Whether these are the keys of a bare PolyNeXt, in either naming."""
    return names.AUTHORS_MARK in keys or names.OUR_MARK in keys


def unwrapped(key: str) -> str:
    """A key without the marks of DDP and torch.compile: ``backbone._orig_mod.x`` is ``backbone.x``."""
    parts = ('.' + key).replace('._orig_mod.', '.')[1:]
    return parts.removeprefix('module.')


def _weights_of(checkpoint: Mapping) -> Mapping:
    """The weights of a container of the authors': an average where there is one that was updated."""
    average = checkpoint.get('ema_state_dict')
    if isinstance(average, Mapping) and int(average.get('n_averaged', 1)) > 0:
        return {key: value for key, value in average.items() if key != 'n_averaged'}
    for name in (*_AVERAGES, *_WEIGHTS):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    # bare: an epoch number or the like may stand among the weights
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def is_polynext_file(path: str | os.PathLike) -> bool:
    """Whether the keys of a PolyNeXt are anywhere in a file, told without loading or executing it."""
    return any(
        is_backbone({unwrapped(text).removeprefix(BACKBONE)}) for text in _pickled_text(path)
    )


def _pickled_text(path: str | os.PathLike) -> Iterator[str]:
    """Every string in the pickles of a file, up to where it is none."""
    # whatever a foreign file does to the parser, it is not one of ours
    with contextlib.suppress(Exception), open(path, 'rb') as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith('data.pkl'):
                        yield from _strings(io.BytesIO(archive.read(name)))
        else:
            file.seek(0)
            # torch's older format: magic number, protocol, machine, then the object
            for _ in range(4):
                yield from _strings(file)


def _strings(stream: BinaryIO) -> Iterator[str]:
    return (argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str))


def _is_cut_archive(path: Path) -> bool:
    """Whether a file starts as torch's archives do and lacks their end."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


_everything_safely = False


@contextlib.contextmanager
def safe_reading() -> Iterator[None]:
    """Within it, mmengine's CheckpointLoader reads every file as :func:`read` does."""
    global _everything_safely
    before, _everything_safely = _everything_safely, True
    try:
        yield
    finally:
        _everything_safely = before


def install_loader() -> None:
    """Let mmengine's CheckpointLoader read PolyNeXt's files, and only those, as :func:`read` does.

    Other people's files, told by their keys, are read as before. An archive that was cut short does not
    tell: it gets the error of :func:`read`. ``unsafe:PATH`` reads any file with
    pickle's full power: it executes what the file says.
    """
    from mmengine.runner.checkpoint import CheckpointLoader

    published = {file.url for file in PUBLISHED.values()}
    schemes = CheckpointLoader._schemes
    if UNSAFE in schemes:
        return
    load_local, load_http = schemes[''], schemes['https://']

    def is_ours(path):
        return _everything_safely or is_polynext_file(path) or _is_cut_archive(path)

    def load_from_local(filename, map_location=None):
        if is_ours(Path(filename).expanduser()):
            return read(filename, map_location)
        return load_local(filename, map_location)

    def load_from_http(filename, map_location=None):
        if _everything_safely or filename in published:
            return read(filename, map_location)
        try:
            path = fetch(filename)  # where mmengine keeps downloads too: it will not fetch it again
        except CheckpointError:
            return load_http(filename, map_location)  # for mmengine to say what it says
        if is_ours(path):
            return read(filename, map_location)
        return load_http(filename, map_location)

    def load_from_unsafe(filename, map_location=None):
        source = filename.removeprefix(UNSAFE)
        path = fetch(source) if is_url(source) else Path(source).expanduser()
        return normalize(torch.load(path, map_location, weights_only=False), source)

    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (UNSAFE, load_from_unsafe),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
