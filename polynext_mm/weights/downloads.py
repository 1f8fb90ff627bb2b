"""Download urls and published names once, completely or not at all, and check them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch

from .errors import CheckpointError
from .files import replacing, sha256_of
from .published import PUBLISHED, Published

# the digest at the end of the names of torchvision's and mm's files
_DIGEST = re.compile(r'[-_][0-9a-f]{8,}\.\w+$')

#: Prefix of the names in ``PUBLISHED`` where a path or url is expected.
PUBLISHED_SCHEME = 'polynext://'


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


def cached_path(url: str) -> Path:
    """Return where the download of a url is kept: in torch.hub's folder, under a name of its own.

    The name is that of the file plus a hash of the url, so that no two urls share a file.
    """
    name = Path(urlparse(url).path).name or 'checkpoint'
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return _folder() / f'{Path(name).stem}-{digest}{Path(name).suffix}'


def _where_mmengine_keeps(url: str) -> Path | None:
    """Return where mmengine keeps a download, if the name has a digest of the content."""
    path = _folder() / Path(urlparse(url).path).name
    return path if _DIGEST.search(path.name) and path.is_file() else None


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / 'checkpoints'


def fetch(url: str) -> Path:
    """Return the local copy of a file, downloading it if it is not there.

    In a distributed run local rank 0 downloads for all processes of its node; rank 0 shows a
    progress bar. Size and SHA-256 of published files are checked where they are known.

    Raises:
        CheckpointError: On every rank, if the download failed on any.
    """
    path = _where_mmengine_keeps(url) or cached_path(url)
    failure = None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not path.exists() and (not distributed or int(os.environ.get('LOCAL_RANK', 0)) == 0):
        rank = torch.distributed.get_rank() if distributed else int(os.environ.get('RANK', 0))
        failure = _download(url, path, progress=rank == 0)
    if distributed:
        failures: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
        failure = next(filter(None, failures), None)
    if failure:
        raise CheckpointError(
            f'could not download {url} ({failure}). Put the file at {path}, or give the path of a '
            'copy instead (`polynext-mm list files` shows where each file belongs)'
        )
    return path


def _download(url: str, path: Path, progress: bool) -> str | None:
    """Download a file completely or not at all; return what went wrong, or None."""
    if progress:
        print(f'Downloading {url} to {path}', file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.hub.download_url_to_file(url, str(partial), progress=progress)
            problem = _problem(partial, url, path.suffix)
            if problem:
                raise CheckpointError(problem)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting for the result
        return f'{type(error).__name__}: {error}'
    return None


def _problem(partial: Path, url: str, suffix: str) -> str | None:
    """Return what is wrong with a downloaded file, or None."""
    file: Published | None = next((one for one in PUBLISHED.values() if one.url == url), None)
    size = partial.stat().st_size
    if file and file.size is not None and size != file.size:
        return f'the download has {size} bytes instead of {file.size}'
    if file and file.sha256 is not None and sha256_of(partial) != file.sha256:
        return 'the download has another SHA-256 than the published file'
    if suffix in ('.pt', '.pth') and not _may_be_complete(partial):
        return 'the download is not a complete checkpoint'
    return None


def _may_be_complete(path: Path) -> bool:
    """Return whether a file is a complete zip archive (torch's format), or in the older format.

    A truncated file in the older format is detected only when it is read.
    """
    with open(path, 'rb') as file:
        return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == pickle.PROTO)
