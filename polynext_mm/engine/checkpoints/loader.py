"""Make mmengine's ``CheckpointLoader``, through which mm reads files and urls, read safely."""

from __future__ import annotations

from typing import Any

from ...compat import require_mmengine
from ...weights import timm_hub
from ...weights.downloads import PUBLISHED_SCHEME, is_url
from ...weights.errors import CheckpointError
from ...weights.reading import UNSAFE, read_as_it_is

_STORES = {'pavi://': 'load_from_pavi', 's3://': 'load_from_ceph', 'petrel://': 'load_from_ceph'}
# as mmengine registers them; the first two are its own regular expressions
_OF_MMENGINE = (
    *(r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://', 'http://', 'https://', ''),
    *('modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://'),
)


def install_loader() -> None:
    """Let mmengine's loader read every file with torch's restricted reader.

    Then nothing in a file is executed, whichever of mmengine's functions loads it and whatever it
    is loaded into. A file that needs code to run must be named as ``unsafe:SOURCE``.
    ``polynext://NAME`` stands for a published file. A second call changes nothing.

    Raises:
        ImportError: If mmengine is not installed; the message says what to install.
    """
    require_mmengine()
    from mmengine.runner.checkpoint import CheckpointLoader

    # mmengine logs the part of a loader's name after load_from_
    def load_from_polynext_mm(filename: str, map_location: Any = None) -> Any:
        return _read(filename, map_location)

    prefixes = (*_OF_MMENGINE, PUBLISHED_SCHEME, UNSAFE)
    CheckpointLoader.register_scheme(prefixes, load_from_polynext_mm, force=True)


def _read(source: str, map_location: Any) -> Any:
    """Read a path, a url, a published name, or any other source that mmengine knows."""
    plain = source.removeprefix(UNSAFE)
    unsafe = source[: len(source) - len(plain)]
    scheme, separator, name = plain.partition('://')
    scheme += separator
    if not separator or is_url(plain) or scheme == PUBLISHED_SCHEME:
        return read_as_it_is(source, map_location)
    if scheme == timm_hub.SCHEME:
        return timm_hub.read_timm(plain)
    from mmengine.runner import checkpoint as mm

    known: dict[str, str] = {}
    if scheme in ('torchvision://', 'modelzoo://'):
        known = mm.get_torchvision_models()
    elif scheme in ('open-mmlab://', 'openmmlab://'):
        known = mm.get_external_models()
        name = mm.get_deprecated_model_names().get(name, name)
    elif scheme == 'mmcls://':
        known = mm.get_mmcls_models()
    if is_url(known.get(name, '')):
        content = read_as_it_is(unsafe + known[name], map_location)
        return _backbone_alone(content) if scheme == 'mmcls://' else content
    store = next((store for store in _STORES if scheme.endswith(store)), None)
    if store is None:
        raise CheckpointError(f'{source} is not a source that mmengine knows: give a path or url')
    if unsafe:
        return getattr(mm, _STORES[store])(plain, map_location)
    raise CheckpointError(
        f'{source} cannot be read safely: fetch the file and give its path, or, if you trust '
        f'whoever made it, read it as mmengine does: {UNSAFE}{source}'
    )


def _backbone_alone(checkpoint: dict) -> dict:
    """Return the backbone of an mmpretrain classifier, as mmengine does."""
    weights = checkpoint.get('state_dict', checkpoint)
    prefix = 'backbone.'
    return dict(
        state_dict={k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    )
