"""The hook into mmengine's ``CheckpointLoader``, through which mm reads every file and url."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..compat import require_mmengine
from .published import PUBLISHED
from .reading import (
    PUBLISHED_SCHEME,
    UNSAFE,
    CheckpointError,
    fetch,
    is_polynext_file,
    is_truncated_archive,
    read,
)

_everything_safely = False


@contextlib.contextmanager
def safe_reading() -> Iterator[None]:
    """Let mmengine's loader read every file as :func:`polynext_mm.weights.read` does.

    Outside this context it reads only PolyNeXt's files that way.
    """
    global _everything_safely
    before, _everything_safely = _everything_safely, True
    try:
        yield
    finally:
        _everything_safely = before


def install_loader() -> None:
    """Let mmengine's loader read PolyNeXt's files as :func:`polynext_mm.weights.read` does.

    These are ``polynext://NAME``, ``unsafe:SOURCE``, the published urls, and files that have the
    keys of a PolyNeXt. A truncated archive does not show its keys and gets the error of ``read``
    too. Any other file is read as mmengine reads it. A second call changes nothing.

    Raises:
        ImportError: If mmengine is not installed; the message says what to install.
    """
    require_mmengine()
    from mmengine.runner.checkpoint import CheckpointLoader

    published = {file.url for file in PUBLISHED.values()}
    schemes = CheckpointLoader._schemes
    if UNSAFE in schemes:
        return
    load_local, load_http = schemes[''], schemes['https://']

    def is_ours(path: Path) -> bool:
        return _everything_safely or is_polynext_file(path) or is_truncated_archive(path)

    # mmengine logs what follows load_from_ in the name of a loader

    def load_from_local(filename: str, map_location: Any = None) -> dict:
        if is_ours(Path(filename).expanduser()):
            return read(filename, map_location)
        return load_local(filename, map_location)

    def load_from_http(filename: str, map_location: Any = None) -> dict:
        if _everything_safely or filename in published:
            return read(filename, map_location)
        try:
            path = fetch(filename)  # mmengine keeps downloads there too: it will not fetch it again
        except CheckpointError:
            return load_http(filename, map_location)  # which raises what mmengine raises
        if is_ours(path):
            return read(filename, map_location)
        return load_http(filename, map_location)

    def load_from_polynext_mm(filename: str, map_location: Any = None) -> dict:
        return read(filename, map_location)

    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        ((PUBLISHED_SCHEME, UNSAFE), load_from_polynext_mm),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
