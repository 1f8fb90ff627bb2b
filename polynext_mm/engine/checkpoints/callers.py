"""Which model a checkpoint is read for.

mmengine tells a loader the name of the file and nothing else, and whoever wrote the file chose its
keys. What the file is for is known to mmengine's function further up: it has the model, or the
runner, or the config. This module looks for it there, in the frames of the call. So nothing of
mmengine's is replaced, references to its functions that were taken before this package was
imported are covered too, and calls for other people's models are left as they are.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch import nn

from ..models import has_ours, unwrapped


@dataclasses.dataclass(frozen=True)
class Caller:
    """On whose behalf mmengine reads a checkpoint.

    Attributes:
        model: The model that is loaded into; None if there is a config of it alone.
        is_ours: Whether a backbone of this package is in the model, or in the one that this model
            is initialized as a part of.
        runner: The Runner, if it is one that loads.
        resumes: Whether the runner resumes.
        named_by_file: Whether the source stood in ``last_checkpoint``, where nobody wrote it.
    """

    model: nn.Module | None = None
    is_ours: bool = False
    runner: Any = None
    resumes: bool = False
    named_by_file: bool = False


def find() -> Caller:
    """Return on whose behalf the function that calls this one was called."""
    caller = Caller()
    for frame in _frames():
        function, variables = frame.f_code.co_name, frame.f_locals
        if function == 'init_weights':
            # mmengine initializes a part, on behalf of the whole
            caller = _updated(caller, is_ours=has_ours(variables.get('self')))
        elif not frame.f_globals.get('__name__', '').startswith('mmengine.'):
            continue
        owner = variables.get('self')
        if function == 'load_checkpoint' and caller.model is None:
            model = variables.get('model', getattr(owner, 'model', None))
            if isinstance(model, nn.Module):
                caller = dataclasses.replace(
                    caller, model=unwrapped(model), is_ours=has_ours(model)
                )
        elif function == '__call__' and isinstance(variables.get('module'), nn.Module):
            caller = _updated(caller, is_ours=has_ours(variables['module']))
        elif function == '_publish_model':
            caller = _updated(caller, has_ours(getattr(variables.get('runner'), 'model', None)))
        elif function == '_init_model' and caller.model is None:
            caller = _updated(caller, is_ours=_names_ours(variables.get('cfg')))
        if caller.model is not None and hasattr(owner, 'call_hook') and _loads(owner, caller.model):
            caller = _with_runner(caller, owner, function)
    return caller


def _loads(runner: Any, model: nn.Module) -> bool:
    """Return whether a model is the one of a runner, or of a FlexibleRunner's strategy."""
    own = getattr(getattr(runner, 'strategy', runner), 'model', None)
    return isinstance(own, nn.Module) and unwrapped(own) is model


def _with_runner(caller: Caller, runner: Any, function: str) -> Caller:
    if function == 'load_checkpoint':
        return dataclasses.replace(caller, runner=runner)
    if function == 'resume':
        return dataclasses.replace(caller, runner=runner, resumes=True)
    if function == 'load_or_resume':
        named = caller.resumes and runner._load_from is None
        return dataclasses.replace(caller, named_by_file=named)
    return caller


def _updated(caller: Caller, is_ours: bool) -> Caller:
    return dataclasses.replace(caller, is_ours=caller.is_ours or is_ours)


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _names_ours(cfg: Any) -> bool:
    """Return whether a config names a backbone of this package as the type of a module."""
    from ...backbones import MetaFormer, PolyNeXt

    ours = (MetaFormer, PolyNeXt)
    cfg = getattr(cfg, '_cfg_dict', cfg)  # of a Config
    if isinstance(cfg, Mapping):
        kind = cfg.get('type')
        is_named = isinstance(kind, str) and kind.rpartition('.')[2] in {c.__name__ for c in ours}
        is_class = isinstance(kind, type) and issubclass(kind, ours)
        return is_named or is_class or any(map(_names_ours, cfg.values()))
    return isinstance(cfg, (list, tuple)) and any(map(_names_ours, cfg))
