"""End a training whose loss is no longer finite, and keep what is needed to find out why."""

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..compat.mmengine import run_forward
from . import models
from .checkpoints.saving import NonFiniteError, checkpoint_hook, save_nonfinite
from .processes import any_rank
from .random_numbers import random_state, set_random_state
from .training_scope import stop_after_training


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop when the loss has not been finite for ``patience`` iterations in a row.

    The error names the first of these iterations, the files of its batch, and the first module
    whose output was not finite. The state is saved as ``nonfinite_iter_N.pth``, from which no run
    resumes. A step that loss scaling skips does not count: the next one's loss is finite.

    If the weights themselves are not finite when a checkpoint is due, the run stops at once.

    Args:
        patience: Iterations in a row with a loss of nan or inf after which the training stops.

    Raises:
        ValueError: For a patience below 1.
    """

    # before a checkpoint of the same iteration
    priority = 'LOW'

    def __init__(self, patience: int = 3):
        if type(patience) is not int or patience < 1:
            raise ValueError(f'patience must be an integer of at least 1, got {patience!r}')
        self.patience = patience
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._random: dict = {}
        self._in_a_row = 0
        self._looked = False
        self._found: list[dict] = []
        self._first = 0
        self._handles: list = []

    def before_run(self, runner: Runner) -> None:
        stop_after_training(runner, lambda: self.after_train(runner))

    def before_train(self, runner: Runner) -> None:
        self._in_a_row = 0
        model = models.unwrapped(runner.model)
        self._handles = [model.register_forward_hook(self._keep_loss)]
        # look before the step, at the weights that gave the loss: afterwards all may be nan
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        if optimizer is not None:
            self._handles.append(
                optimizer.register_step_pre_hook(lambda *arguments: self._look(runner))
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._batch, self._random = data_batch, random_state()
        self._loss, self._looked = None, False

    def after_train_iter(self, runner: Runner, **step: object) -> None:
        if not self._looked:  # the step was skipped, or gradients accumulate
            self._look(runner)
        self._batch = None
        if self._in_a_row >= self.patience:
            self._stop(runner, runner.iter + 1)

    def weights_not_finite(self, runner: Runner, iteration: int) -> None:
        """Stop at once if the loss was not finite either: training cannot recover.

        AtomicCheckpointHook calls this.
        """
        if self._in_a_row:
            self._stop(runner, iteration)

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep_loss(self, model: nn.Module, arguments: tuple, output: Any) -> None:
        if model.training and isinstance(output, Mapping):
            self._loss = sum(
                part.detach().float().sum()
                for key, value in output.items()
                if 'loss' in key
                for part in _tensors(value)
            )

    def _look(self, runner: Runner) -> None:
        """Count this iteration if the loss of any rank is not finite."""
        self._looked = True
        finite = self._loss is None or bool(torch.as_tensor(self._loss).isfinite())
        if not any_rank(not finite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row == 1:
            self._first = runner.iter + 1
            found = dict(
                finite=finite, files=_files(self._batch), module=self._first_module(runner)
            )
            self._found = dist.all_gather_object(found)
            runner.logger.warning(f'The loss of iteration {self._first} is not finite')

    def _first_module(self, runner: Runner) -> str:
        """Find the first module with non-finite output, by recomputing the batch."""
        model = models.unwrapped(runner.model)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        after = random_state()
        first: list[str] = []
        loss = self._loss
        try:
            set_random_state(self._random)
            with torch.no_grad(), runner.optim_wrapper.optim_context(model), _watched(model, first):
                data = model.data_preprocessor(deepcopy(self._batch), True)
                losses = run_forward(model, data, 'loss')
        finally:
            set_random_state(after)
            self._loss = loss
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        if first:
            return first[0]
        bad = [key for key, value in losses.items() if not _finite(value)]
        return f'no module, but {", ".join(bad)}' if bad else 'none when it was computed again'

    def _stop(self, runner: Runner, iteration: int) -> None:
        self.after_train(runner)
        culprits = [found for found in self._found if not found['finite']] or self._found
        files = [file for found in culprits for file in found['files']]
        module = culprits[0]['module']
        hook = checkpoint_hook(runner)
        folder = hook.folder(runner) if hook else Path(runner.work_dir)
        path = save_nonfinite(
            runner, folder, iteration, dict(since=self._first, files=files, module=module)
        )
        raise NonFiniteError(
            f'the loss is not finite since iteration {self._first}, {self._in_a_row} iterations in '
            f'a row; first output that is not finite: {module}; the batch: '
            f'{", ".join(files) or "its samples name no files"}. The state is in {path}; go on '
            'from the last checkpoint with --resume, with a lower learning rate or without these '
            'files'
        )


@contextlib.contextmanager
def _watched(model: nn.Module, first: list[str]) -> Iterator[None]:
    """Put the first module whose output is not finite into ``first``."""

    def watch(name):
        def look(module, arguments, output):
            if not first and not _finite(output):
                first.append(f'{name} ({type(module).__name__})')

        return look

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _finite(value: Any) -> bool:
    return all(bool(part.isfinite().all()) for part in _tensors(value) if part.is_floating_point())


def _files(batch: Any) -> list[str]:
    """Return the image files of an mm batch."""
    samples = batch.get('data_samples', []) if isinstance(batch, Mapping) else []
    return [str(sample.img_path) for sample in samples if hasattr(sample, 'img_path')]
