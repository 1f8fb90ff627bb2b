"""What a training or an evaluation prints: a few lines, while its log file has everything.

mmengine prints its log: some 560 lines of hooks, build flags and config before the first iteration.
``polynext-mm train`` and ``test`` print only warnings, the lines of ``compat.logs.say``, and those
of :class:`ConsoleHook`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import logging.handlers
import numbers
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..compat.logs import LIVE, NOISE, bar, import_quietly, say, without_noise
from ..figures import MAIN_METRICS
from . import models

_FIRST = 5.0  # seconds between lines at first
_LAST = 60.0  # and later, from 10 minutes on
_SHOWN = 6  # metrics per line


@contextlib.contextmanager
def quiet(scope: str | None = None) -> Iterator[None]:
    """Keep Python's warnings, and what mm prints when imported, off the console.

    Warnings go into the log file of the next :class:`QuietRunner`.

    Args:
        scope: The package to import, 'mmseg' or 'mmdet'.
    """
    logger = logging.getLogger('py.warnings')
    handlers, propagate = logger.handlers[:], logger.propagate
    logging.captureWarnings(True)
    # holds warnings until there is a file
    logger.handlers, logger.propagate = [logging.handlers.MemoryHandler(1000, logging.ERROR)], False
    try:
        if scope in ('mmseg', 'mmdet'):
            import_quietly(f'{scope}.datasets')
        yield
    finally:
        logging.captureWarnings(False)
        logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def few_lines() -> Iterator[None]:
    """Print only the log's warnings and the lines of ``say``, for runs without a log file."""
    shown = _OnConsole()
    # before anything redirects the stream that its handler prints to
    handlers = MMLogger.get_current_instance().handlers
    formats = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.addFilter(shown)
        handler.setFormatter(_Plain())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        LIVE.clear()
        for handler, formatter in zip(handlers, formats):
            handler.removeFilter(shown)
            handler.setFormatter(formatter)


class _OnConsole(logging.Filter):
    """Passes warnings, the lines of ``say``, and the tables of an evaluation if asked for."""

    with_tables = False

    def filter(self, record: logging.LogRecord) -> bool:
        shows = self._shows(record)
        if shows:
            LIVE.clear()
        return shows

    def _shows(self, record: logging.LogRecord) -> bool:
        if getattr(record, 'console', False):
            return True
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            return not any(noise in text for noise in NOISE)
        return self.with_tables and text.startswith(('\n+--', '\n Average Precision'))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f'{record.levelname}: {text}'


class QuietRunner(Runner):
    """mmengine's Runner with a quiet console and a :class:`ConsoleHook`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_hook(ConsoleHook())

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        with without_noise():
            built = super().build_evaluator(evaluator)
        built.evaluate = functools.partial(_printing_into_log, built.evaluate)
        return built

    @staticmethod
    def build_dataloader(*args, **options) -> DataLoader:
        with without_noise():
            return Runner.build_dataloader(*args, **options)

    def load_checkpoint(self, *args, **options):
        with without_noise():
            return super().load_checkpoint(*args, **options)

    def build_logger(self, *args, **options) -> MMLogger:
        logger = super().build_logger(*args, **options)
        held = logging.getLogger('py.warnings').handlers
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                for memory in held:
                    if isinstance(memory, logging.handlers.MemoryHandler):
                        memory.setTarget(handler)
                        memory.flush()
                        memory.flushLevel = logging.NOTSET  # at once from now on
            else:
                handler.addFilter(_OnConsole())
                handler.setFormatter(_Plain())
        return logger


def _printing_into_log(evaluate: Callable[[int], dict], size: int) -> dict:
    """Evaluate, and log what pycocotools and others print; the summary is logged separately."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return evaluate(size)
    finally:
        lines = printed.getvalue().splitlines()
        for _, part in itertools.groupby(lines, lambda line: line.startswith(' Average')):
            MMLogger.get_current_instance().info('\n' + '\n'.join(part))


class ConsoleHook(Hook):
    """Print a header, the first iteration, a line every few seconds, metrics, and what to do next.

    Lines have the loss, the seconds per iteration, and the time left at the pace since the first
    one, validation included. A terminal shows a bar below them.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        self._started = time.monotonic()
        self._first = runner.iter
        self._shown = (self._first, self._started)
        if is_main_process():
            for line in _head(runner):
                say(line)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done, now = runner.iter + 1, time.monotonic()
        if not is_main_process():
            return
        before, since = self._shown
        if done == self._first + 1:  # includes one-time loading
            self._paced = now
            left = ''
        else:
            pace = (now - self._paced) / (done - self._first - 1)
            left = f'  {duration(pace * (runner.max_iters - done))} left'
        if done > self._first + 1 and done < runner.max_iters and now - since < self._pause(now):
            # without the loss, since reading it would wait for the GPU
            LIVE.show(f'{bar(done, runner.max_iters)} {done}/{runner.max_iters}{left}')
            return
        loss = (outputs or {}).get('loss')
        loss = loss.item() if isinstance(loss, torch.Tensor) else loss
        shown = '' if loss is None else f'  loss {float(loss):.4g}'
        each = (now - since) / max(done - before, 1)
        say(f'iteration {done}/{runner.max_iters}{shown}  {each:.2f} s each{left}')
        self._shown = (done, now)

    def _pause(self, now: float) -> float:
        return min(_LAST, max(_FIRST, (now - self._started) / 10))

    def before_val(self, runner: Runner) -> None:
        self._before_evaluating()

    def before_test(self, runner: Runner) -> None:
        self._before_evaluating()
        for handler in runner.logger.handlers:
            for one in handler.filters:
                if isinstance(one, _OnConsole):
                    one.with_tables = True
        if is_main_process():
            say(f'log: {runner.logger.log_file}')
            say(f'data: {len(runner.test_dataloader.dataset)} samples')

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        self._evaluating(batch_idx, len(runner.val_dataloader), 'validation')

    def after_test_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        self._evaluating(batch_idx, len(runner.test_dataloader), 'test')

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        if is_main_process() and metrics:
            say(f'validation at {runner.iter}:  {_metrics(metrics)}')
            now = time.monotonic()
            self._shown = (runner.iter, now)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        if is_main_process() and metrics:
            say(f'test:  {_metrics(metrics)}')

    def after_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        saver = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        best = getattr(saver, 'best_ckpt_path', None)
        last = runner.message_hub.get_info('last_ckpt') if saver else None
        say(f'done in {duration(time.monotonic() - self._started)}')
        if best:
            score = runner.message_hub.get_info('best_score')
            say(f'best checkpoint: {best} ({saver.key_indicators[0]} {_number(score)})')
        if best or last:
            if not best:
                say(f'last checkpoint: {last}')
            say(f'next: polynext-mm predict IMAGE {runner.work_dir}')

    def _before_evaluating(self) -> None:
        self._evaluated = self._evaluation = time.monotonic()

    def _evaluating(self, index: int, number: int, what: str) -> None:
        now = time.monotonic()
        if not is_main_process() or index + 1 == number:
            return
        left = (now - self._evaluation) / (index + 1) * (number - index - 1)
        line = f'{what} {index + 1}/{number}  {duration(left)} left'
        if now - self._evaluated >= _FIRST:
            say(line)
            self._evaluated = now
        else:
            LIVE.show(f'{bar(index + 1, number)} {line}')


def _head(runner: Runner) -> Iterator[str]:
    """Yield lines that describe a training: its files, network, data and schedule."""
    cfg: Config = runner.cfg
    model = models.unwrapped(runner.model)
    backbone = getattr(model, 'backbone', None)
    arch = (cfg.model.get('backbone') or {}).get('arch')
    name = f'{type(model).__name__} with {type(backbone).__name__}'
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device.type
    dtype = getattr(runner.optim_wrapper, 'cast_dtype', None)
    yield f'log: {runner.logger.log_file}'
    yield (
        f'network: {name}{f" {arch}" if isinstance(arch, str) else ""}, '
        f'{parameters / 1e6:.3g} M parameters, on {device}'
        + (f' in {str(dtype).removeprefix("torch.")}' if dtype else '')
    )
    loader = runner.train_dataloader
    batch = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    data = f'data: {len(loader.dataset)} samples to train on'
    if runner.val_loop is not None:
        data += f', {len(runner.val_dataloader.dataset)} to validate'
    yield data
    total = batch * runner.world_size
    every = getattr(runner.train_loop, 'val_interval', None)
    unit = 'epochs' if 'Epoch' in type(runner.train_loop).__name__ else 'iterations'
    yield (
        f'schedule: {runner.max_iters} iterations of {total} images, '
        f'{runner.max_iters * total / max(len(loader.dataset), 1):.3g} times each'
        + (f'; validation every {every} {unit}' if every and runner.val_loop is not None else '')
    )
    if runner.iter:
        yield f'resumed at iteration {runner.iter}'


def _metrics(metrics: Mapping[str, float]) -> str:
    shown = {
        name: f'{name}: {_number(value)}'
        for name, value in metrics.items()
        if isinstance(value, numbers.Real) and name not in ('data_time', 'time')
    }
    main = [name for name in MAIN_METRICS if name in shown]
    names = [*main, *(name for name in shown if name not in main)]
    return ', '.join(shown[name] for name in names[:_SHOWN])


def _number(value: float) -> str:
    return f'{value:.4g}'


def duration(seconds: float) -> str:
    """Return seconds in words: ``8 s``, ``3 min 5 s``, ``2 h 14 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60} s'
    if whole < 86400:
        return f'{whole // 3600} h {whole % 3600 // 60} min'
    return f'{whole // 86400} d {whole % 86400 // 3600} h'
