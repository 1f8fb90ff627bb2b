"""Read checkpoint files, executing nothing that they hold, and bring them to one form.

The form is mmengine's: ``dict(state_dict=..., meta=...)`` plus whatever else an mm checkpoint
holds. The keys of the backbone have the prefix ``backbone.``. Names are still those of whoever
wrote the file: they are translated on loading, where the arch is known
(:mod:`polynext_mm.weights.loading`).

This module needs torch alone. NumPy, mmengine and safetensors are imported only for a file that
holds something of theirs.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from torch import Tensor

from .names import is_backbone, join_backbone, split_backbone, unwrapped
from .published import PUBLISHED

#: Prefix of the names in ``PUBLISHED`` where a path or url is expected.
PUBLISHED_SCHEME = 'polynext://'
#: Prefix of a path, url or published name that may execute code when it is read.
UNSAFE = 'unsafe:'

# Where the authors' reader looks for weights: averages first.
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema')
_WEIGHTS = ('state_dict', 'model')


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used as asked; the message names it and says what to do."""


def read(source: str | os.PathLike, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint and bring it to the form described above.

    Args:
        source: Path, http(s) url or ``polynext://NAME``, with NAME of ``weights.PUBLISHED``. The
            file, .pt, .pth or .safetensors, is one of the authors', in any container that their
            release reads or writes, or one of ours. After ``unsafe:`` it is read with all of
            pickle, which executes what the file says.
        map_location: As for ``torch.load``; for .safetensors a device or None.

    Returns:
        The checkpoint, with ``state_dict`` and ``meta``. The log statistics in an mm checkpoint
        are mmengine's ``HistoryBuffer``, or bare attributes where mmengine is not installed.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the name is not a published one, or the file cannot be downloaded, is
            damaged, needs code to be executed, or holds no weights.
        ImportError: If the file is .safetensors and safetensors is not installed.
        ValueError: If the file is .safetensors and ``map_location`` is not a device or None.
    """
    source = os.fspath(source)
    path = local_path(source.removeprefix(UNSAFE))
    return normalize(_load(path, map_location, safely=not source.startswith(UNSAFE)), path)


def local_path(source: str) -> Path:
    """Return the local file that a path, url or ``polynext://`` name stands for.

    A file that is not there yet is downloaded.

    Raises:
        CheckpointError: If it cannot be downloaded, or the name is not a published one.
    """
    if source.startswith(PUBLISHED_SCHEME):
        name = source.removeprefix(PUBLISHED_SCHEME)
        if name not in PUBLISHED:
            known = ', '.join(PUBLISHED_SCHEME + known for known in PUBLISHED)
            raise CheckpointError(f'{source} is not a published file; these are: {known}')
        source = PUBLISHED[name].url
    return fetch(source) if is_url(source) else Path(source).expanduser()


def is_url(source: str) -> bool:
    """Return whether ``source`` is an http(s) url."""
    return source.startswith(('http://', 'https://'))


# ------------------------------------------------------------------------------------------------
# Downloading
# ------------------------------------------------------------------------------------------------


def cached_path(url: str) -> Path:
    """Return where the download of a url is kept: in torch.hub's folder, as mmengine does."""
    return Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name


def fetch(url: str) -> Path:
    """Return the local copy of a file, downloading it if it is not there.

    In a distributed run local rank 0 downloads for all processes of its node; rank 0 shows a
    progress bar.

    Raises:
        CheckpointError: On every rank, if the download failed on any.
    """
    path = cached_path(url)
    failure = None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not path.exists() and (not distributed or int(os.environ.get('LOCAL_RANK', 0)) == 0):
        rank = torch.distributed.get_rank() if distributed else int(os.environ.get('RANK', 0))
        failure = _download(url, path, progress=rank == 0)
    if distributed:
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
        failure = next(filter(None, failures), None)
    if failure:
        raise CheckpointError(
            f'could not download {url} ({failure}). Put the file at {path}, or give the path of a '
            'copy instead; to start from scratch instead, set the init_cfg of the backbone to None'
        )
    return path


def _download(url: str, path: Path, progress: bool) -> str | None:
    """Download a file, completely or not at all, and return what went wrong, if anything did."""
    partial = path.with_name(f'{path.name}.{os.getpid()}.part')
    if progress:
        print(f'Downloading {url} to {path}', file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), progress=progress)
        if path.suffix in ('.pt', '.pth') and not _may_be_complete(partial):
            return 'what arrived is not a complete checkpoint'
        os.replace(partial, path)
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting to hear of any failure
        return f'{type(error).__name__}: {error}'
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return None


def _may_be_complete(path: Path) -> bool:
    """Return whether a file is a complete zip archive, torch's format, or in its older format.

    Whether a file in the older format is complete shows only when it is read.
    """
    with open(path, 'rb') as file:
        return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == pickle.PROTO)


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def _load(path: Path, map_location: Any, safely: bool) -> Any:
    """Return what a file holds, with an explanation of what is refused or damaged."""
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {path}: check the path (relative paths start at {Path.cwd()})'
        )
    load_tensors = None
    if path.suffix == '.safetensors':
        if not isinstance(map_location, (str, torch.device, type(None))):
            raise ValueError(
                f'map_location must be a device or None for {path}, got {map_location!r}'
            )
        load_tensors = _safetensors_reader()
    if not safely and not load_tensors:
        return torch.load(path, map_location=map_location, weights_only=False)
    try:
        if load_tensors:
            return load_tensors(path, device=str(map_location or 'cpu'))
        with torch.serialization.safe_globals(allowed_globals(path)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # noqa: BLE001 - damage shows in many ways, all the same to a user
        refused = _refused(error)
        if refused:
            raise CheckpointError(
                f'{path} holds more than weights and was not read, since reading all of it could '
                f'execute code: {refused}\nIf you trust whoever made it, read it as mmengine '
                f'does: {UNSAFE}{path}'
            ) from error
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is damaged, truncated or not a checkpoint: '
            f'{type(error).__name__}: {reason}. Delete it and get it again'
        ) from error


def _safetensors_reader() -> Callable[..., dict[str, Tensor]]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            'reading a .safetensors file needs safetensors: run `pip install safetensors`',
            name=error.name,
        ) from error
    return load_file


def _refused(error: Exception) -> str | None:
    """Return the line of torch's long explanation that names what was refused, if anything was."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    marks = ('GLOBAL', 'getattr', 'unrecognized function', 'Can only')
    return next(
        (line.strip() for line in str(error).splitlines() if any(mark in line for mark in marks)),
        None,
    )


def allowed_globals(path: Path) -> list:
    """Return what a checkpoint may hold besides tensors: no code of the file's runs for these."""
    return [argparse.Namespace, slice, *_allowed_of_numpy(), *_allowed_of_mmengine(path)]


def _allowed_of_numpy() -> list:
    if importlib.util.find_spec('numpy') is None:
        return []
    import numpy as np

    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    codes = np.typecodes['AllInteger'] + np.typecodes['AllFloat']
    allowed = [np.ndarray, np.dtype, type(np.dtype(bool)), type(np.dtype(str))]
    allowed += {type(np.dtype(code)) for code in codes}
    for core in ('numpy.core', 'numpy._core'):  # the names in NumPy 1 and in NumPy 2
        allowed += [
            (multiarray.scalar, f'{core}.multiarray.scalar'),
            (multiarray._reconstruct, f'{core}.multiarray._reconstruct'),
        ]
    return allowed


class _BareHistoryBuffer:
    """The attributes of a ``HistoryBuffer`` in a file, read where mmengine is not installed."""


def _allowed_of_mmengine(path: Path) -> list:
    """Return what reading mmengine's log statistics takes, if there may be any in the file.

    Importing mmengine takes a second, which a file without them should not cost.
    """
    if 'mmengine' not in sys.modules and not any(
        'HistoryBuffer' in text for text in _pickled_text(path)
    ):
        return []
    if importlib.util.find_spec('mmengine') is None:
        history_buffer = _BareHistoryBuffer
    else:
        from mmengine.logging import HistoryBuffer as history_buffer  # noqa: N813

    def attribute(owner: Any, name: str) -> Any:
        # a pickled HistoryBuffer refers to its own methods by getattr
        if owner is not history_buffer and not isinstance(owner, history_buffer):
            raise pickle.UnpicklingError(f'getattr of {owner!r} is not a HistoryBuffer statistic')
        return None if history_buffer is _BareHistoryBuffer else getattr(owner, name)

    return [
        (history_buffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (attribute, 'builtins.getattr'),
    ]


# ------------------------------------------------------------------------------------------------
# What a file holds
# ------------------------------------------------------------------------------------------------


def normalize(checkpoint: Any, source: str | os.PathLike) -> dict:
    """Bring the content of a file to the form described above.

    Args:
        checkpoint: What the file holds.
        source: The file, for messages, here and when the weights are loaded.

    Raises:
        CheckpointError: If there are no weights in it.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    if isinstance(checkpoint.get('meta'), Mapping):
        whole = dict(checkpoint)
        # mmengine would execute the config of an old checkpoint on resuming
        whole['meta'] = {k: v for k, v in checkpoint['meta'].items() if k != 'config'}
        # mm keeps an average, if it has one, in state_dict itself
        weights = checkpoint.get('state_dict')
    else:
        whole = {'meta': {}}
        weights = _find_weights(checkpoint)
    weights = (
        {unwrapped(key): value for key, value in weights.items() if isinstance(key, str)}
        if isinstance(weights, Mapping)
        else {}
    )
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f'{source} holds no weights: its keys are {", ".join(map(str, list(checkpoint)[:8]))}'
        )
    backbone, others = split_backbone(weights)
    if is_backbone(others):  # a bare backbone, with its classifier
        backbone, others = others, {}
    state_dict = OrderedDict(join_backbone(backbone, others))
    # torch hands this to the module of each prefix, so that its messages can name the file
    state_dict._metadata = {prefix: {'source': str(source)} for prefix in ('', 'backbone')}
    whole['state_dict'] = state_dict
    return whole


def _find_weights(checkpoint: Mapping) -> Mapping:
    """Return the weights in one of the authors' containers: an average, if it was ever updated."""
    average = checkpoint.get('ema_state_dict')
    if isinstance(average, Mapping) and int(average.get('n_averaged', 1)) > 0:
        return {key: value for key, value in average.items() if key != 'n_averaged'}
    for name in (*_AVERAGES, *_WEIGHTS):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    # bare weights, perhaps with an epoch number or the like among them
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def is_polynext_file(path: str | os.PathLike) -> bool:
    """Return whether a file has the keys of a PolyNeXt, without loading or executing it."""
    for text in _pickled_text(path):
        backbone, others = split_backbone({unwrapped(text): None})
        if is_backbone(backbone or others):
            return True
    return False


def is_truncated_archive(path: Path) -> bool:
    """Return whether a file begins as torch's archives do and lacks their end."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


def _pickled_text(path: str | os.PathLike) -> Iterator[str]:
    """Yield every string in the pickles of a file, up to where it is not one."""
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
