"""What resuming takes from a checkpoint: its own parts, rebuilt from plain values.

A checkpoint of a stranger's may hold anything under any name. Nothing in it says which files are
removed or read: paths count by their names, inside the folders of the run.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...weights.errors import CheckpointError, shown

# what has checks of its own; hooks of a run's own may need anything else that is plain
_WEIGHTS = ('state_dict', 'ema_state_dict')
_META = {'epoch', 'iter', 'seed', 'dataset_meta', 'time', 'nonfinite'}
# of the message hub: the run has its own
_OF_THIS_RUN = {'cfg', 'seed', 'experiment_name', 'mmengine_version', 'dataset_meta'}


def needed(checkpoint: Mapping, source: Any, folders: Iterable[Path]) -> tuple[dict, list[str]]:
    """Return what resuming needs of a checkpoint.

    Args:
        checkpoint: As :func:`polynext_mm.weights.read` returns it.
        source: The file, for messages.
        folders: Where the run keeps checkpoints.

    Returns:
        The checkpoint without the rest, and the names of what was left out.

    Raises:
        CheckpointError: If it is not one that can be resumed from.
    """
    meta, hub = checkpoint['meta'], checkpoint.get('message_hub')
    if not isinstance(hub, Mapping) or not all(
        isinstance(hub.get(part), Mapping) for part in ('log_scalars', 'runtime_info')
    ):
        raise CheckpointError(
            f'{source} holds no state of a training that could be resumed: to start from its '
            'weights, give it as load_from without --resume'
        )
    for key in ('epoch', 'iter', 'seed'):
        value = meta.get(key)
        if type(value) is not int and not (key == 'seed' and value is None):
            raise CheckpointError(f'{source}: {key} of meta is {_kind(value)}, not a number')
        if value is not None and not 0 <= value < 2**32:
            raise CheckpointError(f'{source}: {key} of meta is not within 0 and 2^32')
    for part in ('optimizer', 'ema_state_dict', 'polynext_resume'):
        if not isinstance(checkpoint.get(part, {}), Mapping):
            raise CheckpointError(f'{source}: {part} is {_kind(checkpoint[part])}, not a dict')
    dropped: list[str] = []
    own = (*_WEIGHTS, 'meta', 'message_hub')
    kept = _plain_items({k: v for k, v in checkpoint.items() if k not in own}, '', dropped)
    for part in ('optimizer', 'param_schedulers', 'polynext_resume'):
        if part in dropped:
            raise CheckpointError(f'{source}: {part} holds other than plain values')
    kept |= {key: checkpoint[key] for key in _WEIGHTS if key in checkpoint}
    kept['meta'] = _plain_items({k: v for k, v in meta.items() if k in _META}, 'meta.', dropped)
    _require_position(kept.get('polynext_resume', {}), meta['iter'], source)
    kept['message_hub'] = _hub(hub, list(folders), dropped)
    for key, value in kept['message_hub']['runtime_info'].items():
        if key.startswith('best_score') and not math.isfinite(value):
            raise CheckpointError(
                f'{source}: {key} of message_hub.runtime_info is {value}, which no other would '
                'be better than: resume from another checkpoint'
            )
    return kept, dropped


def _require_position(ours: Mapping, iteration: int, source: Any) -> None:
    """Check what says where in the data and in the random numbers a run was."""
    states = ours.get('random_states', [])
    if not isinstance(states, list) or not all(isinstance(state, Mapping) for state in states):
        raise CheckpointError(
            f'{source}: polynext_resume.random_states is {_kind(states)}, and no list with a dict '
            'for each process: resume from another checkpoint'
        )
    for key, most in (('batches_of_epoch', iteration), ('batch_size', 2**32)):
        value = ours.get(key)
        if key in ours and value is not None and (type(value) is not int or not 0 <= value <= most):
            raise CheckpointError(
                f'{source}: polynext_resume.{key} is {shown(repr(value), 40)}, and no number from '
                f'0 to {most}: resume from another checkpoint'
            )


def _hub(hub: Mapping, folders: list[Path], dropped: list[str]) -> dict:
    from mmengine.logging import HistoryBuffer

    scalars = {
        key: value
        for key, value in hub['log_scalars'].items()
        if isinstance(key, str) and isinstance(value, HistoryBuffer)
    }
    dropped += [f'log_scalars.{key}' for key in hub['log_scalars'] if key not in scalars]
    info = {key: value for key, value in hub['runtime_info'].items() if key not in _OF_THIS_RUN}
    info = _plain_items(info, 'runtime_info.', dropped)
    for key in [key for key in info if key.startswith(('best_ckpt', 'last_ckpt'))]:
        path = _inside(info.pop(key), folders)
        if path is not None and (key.startswith('last') or Path(path).name.startswith('best_')):
            info[key] = path
    for key in [key for key in info if key.startswith('best_score')]:
        if not isinstance(info[key], numbers.Real):
            dropped.append(f'runtime_info.{key}')
            del info[key]
    if 'keep_ckpt_ids' in info:
        kept = info['keep_ckpt_ids']
        kept = kept if isinstance(kept, (list, tuple)) else []
        info['keep_ckpt_ids'] = [step for step in kept if type(step) is int]
    resumed = hub.get('resumed_keys')
    resumed = resumed if isinstance(resumed, Mapping) else {}
    return dict(
        log_scalars=scalars,
        runtime_info=info,
        resumed_keys={
            key: bool(value)
            for key, value in resumed.items()
            if (key in scalars or key in info) and isinstance(value, (bool, int))
        },
    )


def _inside(path: Any, folders: list[Path]) -> str | None:
    """Return the file of a path's name inside the folders of the run, if there is one."""
    name = Path(path).name if isinstance(path, str) and '\0' not in path else ''
    if not name.endswith('.pth'):
        return None
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


_ODD = object()


def _plain_items(values: Mapping, where: str, dropped: list[str]) -> dict:
    """Return the items that are plain, adding the names of the others to ``dropped``."""
    plain = {}
    for key, value in values.items():
        rebuilt = _plain(value) if isinstance(key, str) else _ODD
        if rebuilt is _ODD:
            dropped.append(f'{where}{key}')
        else:
            plain[key] = rebuilt
    return plain


def _plain(value: Any) -> Any:
    """Return a value of numbers, texts, lists, dicts and tensors, or ``_ODD`` for any other."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        # of NumPy's numbers, some are Python's as well
        return value.item() if type(value).__module__ == 'numpy' else value
    if type(value).__module__ == 'numpy':
        return value.tolist()
    if isinstance(value, Mapping):
        items = {key: _plain(item) for key, item in value.items()}
        if any(item is _ODD for item in items.values()):
            return _ODD
        return Counter(items) if isinstance(value, Counter) else items
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            items = [_plain(item) for item in value]
            return _ODD if any(item is _ODD for item in items) else kind(items)
    return _ODD


def _kind(value: Any) -> str:
    return 'missing' if value is None else f'a {type(value).__name__}'
