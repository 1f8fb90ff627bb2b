"""Checkpoints that survive crashes: written completely or not at all, and found again.

A checkpoint is written to a temporary file in its folder, flushed to disk and renamed; only then
does ``last_checkpoint`` name it, and only then are older ones removed. At any moment the work dir
holds the newest finished checkpoint under its own name.
"""

from __future__ import annotations

import functools
import io
import math
import re
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...compat import mmengine as private
from ...weights import CheckpointError, containers, read
from ...weights.errors import shown
from ...weights.files import replacing
from .. import models
from ..processes import on_main
from .resuming import Continuation, folders, keep_files_inside, require_training, settings_of

# the key in our checkpoints for everything that mmengine's do not hold
RESUME = 'polynext_resume'
INTERRUPTED = 'interrupted_iter_{}.pth'
NONFINITE = 'nonfinite_iter_{}.pth'
_ATOMIC = 'polynext_atomic'
_TEMPLATES = ('iter_{}.pth', 'epoch_{}.pth', INTERRUPTED)
_PARTIAL = re.compile(r'\..+\.\d+\.part')


class NonFiniteError(ArithmeticError):
    """A training whose loss or weights are no longer finite."""


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file so that a reader always finds the old or the new content, complete.

    Raises:
        CheckpointError: If the disk or the folder refuses; the old content is untouched.
    """
    try:
        with replacing(path) as partial:
            content = data.encode(errors='surrogateescape') if isinstance(data, str) else data
            partial.write_bytes(content)
    except OSError as error:
        raise CheckpointError(
            f'{path} could not be written ({error.strerror}): make room in {path.parent} or make '
            'it writable, and go on with --resume; the checkpoints in it are untouched'
        ) from error


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of killed writers; only the run that owns the folder may."""
    for path in folder.glob('.*.part'):
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()


class AtomicBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writes."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, obj)


register_backend(_ATOMIC, AtomicBackend, force=True)


class _DeferredRemoval(LocalBackend):
    """Record what is to be removed, so that it is removed only once its replacement exists."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[Path] = []

    def remove(self, filepath: str | Path) -> None:
        self.files.append(Path(filepath))

    def isdir(self, filepath: str | Path) -> bool:
        return False  # our checkpoints are files, so no folder is ever removed


# ------------------------------------------------------------------------------------------------
# Finding
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint of a folder, and the reason for choosing it.

    Attributes:
        path: The checkpoint; None if there is none.
        report: One line on why it was chosen and which others were passed over.
    """

    path: Path | None
    report: str


def newest_checkpoint(folder: Path, templates: Iterable[str] = ()) -> Newest:
    """Find the checkpoint to resume from, whatever ``last_checkpoint`` says.

    The newest is the one whose stored time is latest, so copying files changes nothing. A run
    always stores a later time than those in its folder, even if the clock was set back.

    Args:
        folder: Where the checkpoints are.
        templates: File names with a {} for the step, in addition to the usual ones.

    Raises:
        CheckpointError: If there are checkpoints and none is whole.
    """
    times, passed_over = times_of_checkpoints(folder, templates)
    count = len(times) + len(passed_over)
    if not count:
        return Newest(None, f'there is no checkpoint in {folder}: the training starts afresh')
    for path in sorted(times, key=times.__getitem__, reverse=True):
        problem = containers.damage(path)
        if problem is None:
            break
        passed_over[path] = problem
    else:
        raise CheckpointError(
            f'none of the checkpoints in {folder} can be resumed from: {_listed(passed_over)}. '
            'Name another one with --resume FILE, or start afresh without --resume, which keeps '
            'these aside'
        )
    report = f'resuming from {path}, the newest whole one of {count} checkpoints'
    last = _last_checkpoint(folder)
    if last != path.name:
        report += f'; last_checkpoint {f"says {last}" if last else "names none"}'
    if passed_over:
        report += f'; passed over {_listed(passed_over)}'
    return Newest(path, report)


def times_of_checkpoints(
    folder: Path, templates: Iterable[str]
) -> tuple[dict[Path, tuple[float, int]], dict[Path, str]]:
    """Return when and at which iteration each checkpoint in a folder was saved, or what is wrong.

    The first dict has the checkpoints that can be resumed from, the second the reasons why the
    others cannot. Tensors are not read.
    """
    patterns = [
        re.compile(re.escape(template).replace(r'\{\}', r'\d+'))
        for template in {*_TEMPLATES, *templates}
    ]
    times, problems = {}, {}
    for path in sorted(folder.glob('*')):
        if path.is_file() and any(pattern.fullmatch(path.name) for pattern in patterns):
            status = path.stat()
            found = _time_and_iteration(path, status.st_size, status.st_mtime_ns)
            if isinstance(found, str):
                problems[path] = found
            else:
                times[path] = found
    return times, problems


def _listed(problems: dict[Path, str]) -> str:
    return ', '.join(f'{path.name} ({problem})' for path, problem in sorted(problems.items()))


def _last_checkpoint(folder: Path) -> str | None:
    """Return the name in ``last_checkpoint``, which is used only in the log."""
    path = folder / 'last_checkpoint'
    if not path.is_file():
        return None
    text = path.read_bytes()[:4096].decode(errors='replace')
    name = Path(text.strip().replace('\0', '')).name
    return name if name.isprintable() else repr(name)


@functools.cache
def _time_and_iteration(path: Path, size: int, changed: int) -> tuple[float, int] | str:
    """Return when and at which iteration a checkpoint was saved, or why it cannot be resumed from.

    Args:
        path: The file.
        size: Its size in bytes.
        changed: When it was last changed; part of the cache key, so that changed files are reread.
    """
    if not zipfile.is_zipfile(path):
        return 'truncated' if size else 'empty'
    try:
        content = containers.outline(path)
    except CheckpointError as error:
        return f'not readable: {shown(str(error).splitlines()[0].removeprefix(f"{path} "))}'
    missing = [
        key
        for key in ('meta', 'state_dict', 'optimizer', 'message_hub')
        if not isinstance(content, dict) or not isinstance(content.get(key), dict)
    ]
    if missing:
        return f'without {", ".join(missing)}'
    meta, ours = content['meta'], content.get(RESUME)
    if not isinstance(meta.get('iter'), int) or not isinstance(meta.get('epoch'), int):
        return 'without the iteration'
    saved_at = ours.get('saved_at') if isinstance(ours, dict) else None
    if not isinstance(saved_at, float):  # saved by mmengine without this package
        try:
            saved_at = time.mktime(time.strptime(str(meta.get('time')), '%Y%m%d_%H%M%S'))
        except ValueError:
            saved_at = changed / 1e9
    return saved_at, meta['iter']


# ------------------------------------------------------------------------------------------------
# What the restricted reader accepts
# ------------------------------------------------------------------------------------------------


class _Logs(HistoryBuffer):
    """A HistoryBuffer pickled without the statistics that are registered with its class."""

    def __reduce__(self) -> tuple:
        return HistoryBuffer, (*self.data, self.max_length)


def make_readable(checkpoint: dict) -> None:
    """Leave functions out of a checkpoint: the run has them anyway, the restricted reader does not.

    The state of OneCycleLR holds one, and every HistoryBuffer holds all registered statistics.
    """
    scalars = checkpoint['message_hub']['log_scalars']
    for key, value in scalars.items():
        if isinstance(value, HistoryBuffer):
            scalars[key] = _Logs(*value.data, value.max_length)
    schedulers = checkpoint.get('param_schedulers', [])
    for states in schedulers.values() if isinstance(schedulers, dict) else [schedulers]:
        states[:] = [
            {key: value for key, value in state.items() if not callable(value)} for state in states
        ]


def require_readable(path: Path, checkpoint: dict) -> None:
    """Check that a checkpoint that was just written can be read.

    Raises:
        CheckpointError: If it cannot, naming the entries that prevent it.
    """
    try:
        containers.load(path)
    except CheckpointError as error:
        trial = path.with_name(f'.{path.name}.0.part')
        try:
            places = list(_unreadable(checkpoint, '', trial))
        finally:
            trial.unlink(missing_ok=True)
        raise CheckpointError(
            f'the training stops, since what it saves could not be resumed from: '
            f'{", ".join(places[:5]) or path} cannot be read without executing code '
            f'({shown(str(error).splitlines()[0], 300)}). Let the hook or option that adds it save '
            'numbers, texts, lists, dicts or tensors'
        ) from error


def _unreadable(value: Any, place: str, trial: Path) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unreadable(item, f'{place}.{key}' if place else str(key), trial)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _unreadable(item, f'{place}[{number}]', trial)
    elif not isinstance(value, (torch.Tensor, str, bool, int, float, type(None))):
        torch.save(value, trial)
        try:
            containers.load(trial)
        except CheckpointError:
            yield f'{place} (a {type(value).__name__})'


# ------------------------------------------------------------------------------------------------
# The hook
# ------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against being killed at any moment.

    It takes the options of CheckpointHook, except those of remote storage: ``out_dir`` is a local
    folder. Files are written under a temporary name and renamed, old ones are removed only once the
    new one and ``last_checkpoint`` exist, and a state whose weights are not finite is never saved
    as last or best.

    Raises:
        ValueError: For ``backend_args`` or ``file_client_args``.
    """

    # metrics of mmseg and mmdet that mmengine does not know
    _default_greater_keys = [*private.greater_is_better(), 'Fscore', 'recall', 'IoU', 'PQ']
    backend_args: dict | None
    file_backend: Any
    _continuation: Continuation | None = None
    _to_read_back: dict | None = None
    _was_read_back = False

    def before_train(self, runner: Runner) -> None:
        if self.backend_args not in (None, {'backend': _ATOMIC}) or self.file_client_args:
            raise ValueError(
                f'{type(self).__name__} writes to local folders: for backend_args or '
                "file_client_args take type='CheckpointHook'"
            )
        self.backend_args = {'backend': _ATOMIC}
        self._validated = False
        if self._continuation is not None:
            self._continuation.apply()
            self._continuation = None
        folder = self.folder(runner)
        resumed_here = (
            private.resumes(runner) and Path(str(private.load_from(runner))).parent == folder
        )
        self._saved_iter = runner.iter if resumed_here else None
        super().before_train(runner)
        # restored after a resume, since mmengine writes a new best score into the last checkpoint
        self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')
        self._saved_at = 0.0
        if is_main_process():
            self._remove_superseded_best(folder)
            times, _ = times_of_checkpoints(folder, [self.filename_tmpl])
            known = (saved_at for saved_at, _ in times.values() if math.isfinite(saved_at))
            self._saved_at = max(known, default=0.0)

    def folder(self, runner: Runner) -> Path:
        """Return the folder of a run's checkpoints."""
        if self.out_dir is None or self.out_dir == runner.work_dir:
            return Path(runner.work_dir)
        if getattr(self, 'file_backend', None) is not None:  # before_train has added the name
            return Path(self.out_dir)
        return Path(self.out_dir) / Path(runner.work_dir).name

    def save_interrupted(self, runner: Runner, iteration: int, together: bool = True) -> None:
        """Save the state after ``iteration`` iterations, unless it was saved already.

        Args:
            runner: The run.
            iteration: Number of finished iterations.
            together: Whether all processes call this at the same time; in validation they do not.
        """
        if self._saved_iter != iteration:
            meta = dict(epoch=runner.epoch, iter=iteration)
            self._save(runner, INTERRUPTED.format(iteration), meta, together)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        ours = checkpoint.setdefault(RESUME, {})
        # never earlier than an existing checkpoint's, even if the clock was set back
        self._saved_at = max(time.time(), math.nextafter(self._saved_at, math.inf))
        ours.update(
            saved_at=self._saved_at, validated=self._validated, settings=settings_of(runner)
        )
        make_readable(checkpoint)
        self._to_read_back = None if self._was_read_back else checkpoint

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not private.resumes(runner):
            return
        source = private.load_from(runner)
        require_training(checkpoint, source)
        meta = checkpoint['meta']
        if meta.get('nonfinite'):
            raise CheckpointError(
                f'{source} was saved because the loss was not finite: it is there to be looked '
                'at, and cannot be resumed from'
            )
        keep_files_inside(checkpoint, folders(runner))
        dataset_meta = getattr(runner.train_dataloader.dataset, 'metainfo', None)
        if repr(dataset_meta) == repr(meta.get('dataset_meta')):
            # mmengine compares pickled bytes, which differ between a ConfigDict and a dict
            meta['dataset_meta'] = dataset_meta
        saved = (checkpoint.get(RESUME) or {}).get('settings') or {}
        self._continuation = Continuation(runner, checkpoint, source, saved)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            # the checkpoint lists the outdated ones too, so that a resumed run can remove them
            kept = [*self.keep_ckpt_ids, step]
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.extend(kept[-1:])
        name = self.filename_tmpl.format(step)
        self.last_ckpt = str(self.folder(runner) / name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._save(runner, name, meta)
        if is_main_process():
            folder = self.folder(runner)
            for path in [
                *(folder / self.filename_tmpl.format(old) for old in outdated),
                *folder.glob(INTERRUPTED.format('*')),
            ]:
                path.unlink(missing_ok=True)

    def _save(self, runner: Runner, name: str, meta: dict, together: bool = True) -> None:
        """Save a checkpoint, and then point ``last_checkpoint`` to it."""
        if together:
            self._require_finite(runner, meta['iter'])
            # mmengine saves on the main rank only: gather here what the others have to add
            runner.call_hook('before_save_in_all_ranks')
        runner.save_checkpoint(
            str(self.folder(runner)),
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            path = self.folder(runner) / name
            if self._to_read_back is not None:
                require_readable(path, self._to_read_back)
                self._was_read_back, self._to_read_back = True, None
            write_atomically(Path(runner.work_dir) / 'last_checkpoint', str(path))
        self._saved_iter = meta['iter']

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        self._require_finite(runner, runner.iter)
        backend, self.file_backend = self.file_backend, _DeferredRemoval()
        self._validated = True
        try:
            super()._save_best_checkpoint(runner, metrics)
            outdated = self.file_backend.files
        finally:
            self.file_backend = backend
            self._validated = False
        best = set(map(str, self._best_paths()))
        for path in outdated:
            if str(path) not in best:
                path.unlink(missing_ok=True)
                runner.logger.info(f'The previous best checkpoint {path} is removed')

    def _best_paths(self) -> list[str]:
        if not self.save_best:
            return []
        if len(self.key_indicators) == 1:
            return [self.best_ckpt_path] if self.best_ckpt_path else []
        return [path for path in self.best_ckpt_path_dict.values() if path]

    def _remove_superseded_best(self, folder: Path) -> None:
        """Remove best files that a killed run had replaced but not yet removed."""
        for best in map(Path, self._best_paths()):
            prefix, step = _prefix_and_step(best.name)
            if step is None:
                continue
            for path in folder.glob('best_*.pth'):
                other_prefix, other_step = _prefix_and_step(path.name)
                if other_prefix == prefix and other_step is not None and other_step < step:
                    path.unlink()

    def _require_finite(self, runner: Runner, iteration: int) -> None:
        """If weights are not finite, save the state for inspection and raise NonFiniteError."""
        bad = on_main(lambda: _nonfinite_weights(runner.model))
        if not bad:
            return
        # NonFiniteHook knows when the loss stopped being finite
        runner.call_hook('weights_not_finite', iteration=iteration)
        path = save_nonfinite(runner, self.folder(runner), iteration, dict(weights=bad[:10]))
        more = f' and {len(bad) - 3} more' if len(bad) > 3 else ''
        raise NonFiniteError(
            f'after iteration {iteration} weights are not finite: {", ".join(bad[:3])}{more}. '
            f'Nothing was saved as last or best; the state is in {path}'
        )

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        content = {
            key: value for key, value in read(ckpt_path).items() if key in self.published_keys
        }
        with io.BytesIO() as file:
            torch.save(content, file)
            data = file.getvalue()
        path = Path(ckpt_path).with_name(
            f'{Path(ckpt_path).stem}-{sha256(data).hexdigest()[:8]}.pth'
        )
        write_atomically(path, data)
        runner.logger.info(f'The checkpoint ({ckpt_path}) is published to {path}.')


def checkpoint_hook(runner: Runner) -> AtomicCheckpointHook | None:
    """Return the hook that saves the checkpoints of a run, if it is ours."""
    return next((hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)), None)


def save_nonfinite(runner: Runner, folder: Path, iteration: int, found: dict[str, Any]) -> Path:
    """Save a non-finite state for inspection; its name and a mark keep it from being resumed."""
    name = NONFINITE.format(iteration)
    runner.save_checkpoint(
        str(folder),
        name,
        meta=dict(epoch=runner.epoch, iter=iteration, nonfinite=found),
        by_epoch=False,
        backend_args={'backend': _ATOMIC},
    )
    return folder / name


def _nonfinite_weights(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, value in models.unwrapped(model).state_dict().items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and not value.isfinite().all()
    ]


def _prefix_and_step(name: str) -> tuple[str, int | None]:
    """Split a file name: ``best_mIoU_iter_80.pth`` gives ('best_mIoU_iter_', 80)."""
    match = re.fullmatch(r'(best_.*?)(\d+)\.pth', name)
    return (match[1], int(match[2])) if match else (name, None)
