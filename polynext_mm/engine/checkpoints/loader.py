"""The hook into mmengine's ``CheckpointLoader``, through which mm reads every file and url."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ...compat import require_mmengine
from ...compat.torch_features import register_load_state_dict_pre_hook
from ...weights import loading, timm_hub
from ...weights.containers import is_truncated_archive
from ...weights.downloads import PUBLISHED_SCHEME, fetch, is_url, plain_path
from ...weights.errors import CheckpointError, shown
from ...weights.published import PUBLISHED
from ...weights.reading import UNSAFE, everything_safely, is_polynext_file, normalize, read
from .. import models
from . import callers, resuming, run_state
from .callers import Caller

# in the metadata of a state dict: the model it is loaded into takes all of it
_WHOLE = 'polynext_whole'
# the models that look for it
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Loader = Callable[[str, Any], dict]


def install_loader() -> None:
    """Let mmengine's loader read safely what is loaded into models with backbones of this package.

    That is every file, whatever is in it, that mmengine's functions load into such a model: its
    Runner's ``load_from`` and ``resume``, ``load_checkpoint``, ``init_cfg``, and whatever calls
    these. ``polynext://NAME``, ``unsafe:SOURCE``, the published urls and files that have the keys
    of a PolyNeXt are read so wherever they are loaded. Everything else is read as mmengine reads
    it. A second call changes nothing.

    Raises:
        ImportError: If mmengine is not installed; the message says what to install.
    """
    require_mmengine()
    from mmengine.runner.checkpoint import CheckpointLoader

    # mmengine logs what follows load_from_ in the name of a loader

    def load_from_polynext_mm(filename: str, map_location: Any = None) -> dict:
        return _read_for(callers.find(), filename, map_location)

    schemes = dict(CheckpointLoader._schemes)
    if UNSAFE in schemes:
        return
    for prefix, loader in schemes.items():
        CheckpointLoader.register_scheme(prefix, _guarded(prefix, loader), force=True)
    CheckpointLoader.register_scheme((PUBLISHED_SCHEME, UNSAFE), load_from_polynext_mm)


def _guarded(prefix: str, loader: Loader) -> Loader:
    """Return mmengine's loader for a prefix, told apart for whom it reads."""

    def guarded(filename: str, map_location: Any = None, **options: Any) -> dict:
        caller = callers.find()
        safely = caller.is_ours or everything_safely.get()
        source = filename if safely else _source_of_ours(prefix, filename)
        if source is not None:
            return _read_for(caller, source, map_location)
        return loader(filename, map_location, **options)

    guarded.__name__ = loader.__name__
    return guarded


def _source_of_ours(prefix: str, filename: str) -> str | None:
    """Return where to read a file that is a PolyNeXt's by its url or keys, else None."""
    if is_url(prefix):
        if filename in {file.url for file in PUBLISHED.values()}:
            return filename
        try:
            # mmengine keeps downloads there too: nobody will fetch it again
            path = fetch(filename, plain_path(filename))
        except CheckpointError:
            return None  # mmengine raises what it raises
    elif prefix:
        return None
    else:
        path = Path(filename).expanduser()
    return str(path) if is_polynext_file(path) or is_truncated_archive(path) else None


def _read_for(caller: Caller, source: str, map_location: Any) -> dict:
    """Read a checkpoint safely, and see to it that it is loaded strictly.

    Raises:
        CheckpointError: As :func:`polynext_mm.weights.read`, and for a source that nobody wrote.
    """
    if caller.named_by_file and (source.startswith(UNSAFE) or '://' in source):
        raise CheckpointError(
            f'last_checkpoint in {caller.runner.work_dir} says {shown(repr(source), 200)}, which '
            'is no file of a training: name the checkpoint to resume from (--resume FILE, or '
            'load_from in the config), or remove last_checkpoint'
        )
    checkpoint = _read(source, map_location)
    if caller.resumes:
        checkpoint = _to_resume(caller, checkpoint, source)
    if models.has_ours(caller.model) and not _checks_itself(caller):
        if '' not in models.backbones(caller.model):
            # carried on by mmengine, which renames keys and calls hooks before it loads
            checkpoint['state_dict']._metadata[''][_WHOLE] = not _trains(caller.runner)
            if caller.model not in _checked:
                _checked.add(caller.model)
                register_load_state_dict_pre_hook(caller.model, _check_whole)
    return checkpoint


def _read(source: str, map_location: Any) -> dict:
    """Read from a path, url, published name, or what mmengine has a name for."""
    unsafe = source.startswith(UNSAFE)
    plain = source.removeprefix(UNSAFE)
    scheme = plain.partition('://')[0] + '://' if '://' in plain else ''
    if not scheme or is_url(plain) or scheme == PUBLISHED_SCHEME:
        return read(source, map_location)
    if scheme == timm_hub.SCHEME:
        return timm_hub.read_timm(plain)
    from mmengine.runner import checkpoint as mm

    if scheme in ('torchvision://', 'modelzoo://'):
        known = mm.get_torchvision_models()
    elif scheme in ('open-mmlab://', 'openmmlab://'):
        known = mm.get_external_models()
    elif scheme == 'mmcls://':
        known = mm.get_mmcls_models()
    else:
        known = {}
    name = plain.removeprefix(scheme)
    name = mm.get_deprecated_model_names().get(name, name) if scheme == 'open-mmlab://' else name
    if is_url(known.get(name, '')):
        return read((UNSAFE if unsafe else '') + known[name], map_location)
    loader = mm.CheckpointLoader._get_checkpoint_loader(plain)
    if unsafe:
        return normalize(loader(plain, map_location), plain)
    raise CheckpointError(
        f'{source} cannot be read safely: fetch the file and give its path, or, if you trust '
        f'whoever made it, read it as mmengine does: {UNSAFE}{source}'
    )


def _to_resume(caller: Caller, checkpoint: dict, source: str) -> dict:
    from mmengine.hooks import CheckpointHook
    from mmengine.logging import print_log

    work_dir = Path(caller.runner.work_dir)
    folders = [work_dir]
    for hook in caller.runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir:
            folders += [Path(hook.out_dir) / work_dir.name, Path(hook.out_dir)]
    kept, dropped = resuming.needed(checkpoint, source, folders)
    if dropped:
        print_log(
            f'{source}: not taken from the checkpoint, since it is no plain value: '
            f'{", ".join(map(shown, dropped[:10]))}',
            logger='current',
            level=logging.WARNING,
        )
    run_state.require_of_run(caller.runner, kept, source)
    return kept


def _trains(runner: Any) -> bool:
    from mmengine.runner import BaseLoop

    return runner is not None and isinstance(runner._train_loop, BaseLoop)


def _checks_itself(caller: Caller) -> bool:
    """Return whether a runner has the hook that checks heads, with options of its own."""
    from ..hooks import CheckpointGuardHook

    hooks = getattr(caller.runner, 'hooks', ())
    return any(isinstance(hook, CheckpointGuardHook) for hook in hooks)


def _check_whole(
    model: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, *_: Any
) -> None:
    """Check what is beside the backbones, where a model is loaded from a file as a whole."""
    from mmengine.logging import print_log

    if prefix or _WHOLE not in local_metadata:
        return
    backbones = models.backbones(model)
    prefixes = tuple(f'{name}.' for name in backbones)
    if backbones and not any(key.startswith(prefixes) for key in state_dict):
        return  # the backbone says it best, when its turn comes
    source, evaluation = local_metadata.get('source'), local_metadata[_WHOLE]
    report = loading.check(model, state_dict, source, evaluation=evaluation, backbones=backbones)
    print_log(report, logger='current')
