"""Make a resumed run equal the uninterrupted one: order of data, augmentation, random numbers.

Each sample is augmented with its own random numbers, drawn from the seed of the run and the
sample's position in the training order. It therefore does not matter which worker loads it, how
many workers there are, or how often the run was interrupted. The random numbers of the model
(dropout, drop path, sampling of regions) come from the process's generators, whose state is saved.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from ..compat import mmengine as private
from ..weights import CheckpointError
from .checkpoints.saving import RESUME, AtomicCheckpointHook
from .processes import on_main
from .random_numbers import random_state, seeded, set_random_state


class _Numbered(int):
    """An index into a data set with its position in the training order."""

    epoch: int
    number: int


class _NumberedSampler(Sampler):
    """The indices of a sampler, numbered over all ranks."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.epoch = 0

    def __getattr__(self, name: str) -> Any:  # batch samplers look up attributes of their sampler
        if name == 'sampler':  # not set yet, while unpickling
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[_Numbered]:
        rank, ranks = dist.get_dist_info()
        for place, index in enumerate(self.sampler):
            numbered = _Numbered(index)
            numbered.epoch, numbered.number = self.epoch, place * ranks + rank
            yield numbered

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)


class _ResumedBatches(Sampler):
    """The batches of a batch sampler, except those that the run has already seen.

    Args:
        batches: The batch sampler, over a numbered sampler.
        endless: Whether to continue with the next epoch when one ends, for training by iteration.
    """

    def __init__(self, batches: Sampler, endless: bool):
        self.batches = batches
        self.sampler = batches.sampler
        self.batch_size = batches.batch_size
        self.drop_last = getattr(batches, 'drop_last', False)
        self.endless = endless
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        yield from itertools.islice(self._all(), skip, None)

    def _all(self) -> Iterator[list[int]]:
        if not self.endless:
            yield from self.batches
            return
        for epoch in itertools.count():
            self.sampler.set_epoch(epoch)
            yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


class _SeededDataset(Dataset):
    """A data set that loads each sample with its own random numbers.

    All other access, such as from a hook that replaces the pipeline, reaches the data set itself.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.__dict__.update(dataset=dataset, seed=seed)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not set yet, while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    def __getitem__(self, index: _Numbered) -> Any:
        if not isinstance(index, _Numbered):
            raise TypeError(
                f'the batch sampler gives {index!r} instead of an index of its sampler: '
                'ReproducibilityHook cannot number its samples'
            )
        with seeded(self.seed, index.epoch, index.number):
            return self.dataset[int(index)]

    def __getitems__(self, indices: Sequence[_Numbered]) -> list:
        return [self[index] for index in indices]

    def __len__(self) -> int:
        return len(self.dataset)


class _Batches:
    """The iterator that IterBasedTrainLoop takes batches from, starting where the run resumes.

    Args:
        loader: The loader, whose batch sampler already skips.
        ignored: How many batches the loop will request only to skip them.
    """

    def __init__(self, loader: DataLoader, ignored: int):
        self._loader = loader
        self._ignored = ignored
        self._iterator = None

    def __iter__(self) -> '_Batches':
        return self

    def __next__(self) -> Any:
        if self._ignored:
            self._ignored -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Do nothing: the batch sampler skips."""


@HOOKS.register_module()
class ReproducibilityHook(Hook):
    """Make a resumed run the same as one that was never interrupted.

    Samples get random numbers from the run's seed and their number, however many workers there are.
    Checkpoints hold the random states of every rank and the position in the data. Validation draws
    no random numbers from training's generators; one that was cut short is repeated on resuming.
    Without ``randomness.seed`` a seed is drawn once, and resumed runs take it from the checkpoint.

    On the CPU, and on GPUs with deterministic kernels (``randomness.deterministic``), the weights
    are then equal bit for bit.

    Raises:
        ValueError: For a train loop, data loader or checkpoint hook that it does not work with.
    """

    # after the before_train of all other hooks
    priority = 'LOWEST'

    def __init__(self):
        self._resumed: dict = {}
        self._states: list[dict] | None = None
        self._in_validation = False
        self._own_state: dict | None = None
        self._done = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if private.resumes(runner):
            self._resumed = dict(checkpoint.get(RESUME) or {})
            if 'random_states' not in self._resumed:
                runner.logger.warning(
                    'The checkpoint holds no random states: the run continues, but differs from '
                    'an uninterrupted one'
                )

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not isinstance(hook, AtomicCheckpointHook):
                raise ValueError(
                    f'{type(self).__name__} needs default_hooks.checkpoint.type='
                    f"'AtomicCheckpointHook', got {type(hook).__name__}"
                )
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if not by_epoch and not isinstance(loop, IterBasedTrainLoop):
            raise ValueError(
                f'{type(self).__name__} works with EpochBasedTrainLoop and IterBasedTrainLoop, '
                f'not with {type(loop).__name__}'
            )
        done = (self._resumed.get('batches_of_epoch') or 0) if by_epoch else loop.iter
        seed = on_main(lambda: runner.seed)
        loop.dataloader = _reproducible(
            private.train_dataloader_settings(runner), loop.dataloader, seed, by_epoch
        )
        if by_epoch:
            self._require_within_an_epoch(runner, done, loop.dataloader.batch_sampler)
        loop.dataloader.batch_sampler.skip = done
        if not by_epoch:
            # a loop either calls skip_iter, or takes and drops every batch to skip
            can_skip = hasattr(type(loop.dataloader_iterator), 'skip_iter')
            loop.dataloader_iterator = _Batches(loop.dataloader, 0 if can_skip else loop.iter)
        self._done = done
        self._epoch = runner.epoch - (done == 0)
        self._restore(runner)
        self._warn_of_another_batch_size(runner, loop.dataloader.batch_sampler.batch_size)
        if self._resumed.get('validated') is False and not (by_epoch and done):
            _validate_if_due(runner, loop.epoch if by_epoch else loop.iter)

    def before_train_epoch(self, runner: Runner) -> None:
        self._epoch, self._epoch_start = runner.epoch, runner.iter - self._done
        self._done = 0
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            runner.train_dataloader.batch_sampler.sampler.set_epoch(runner.epoch)

    def before_val(self, runner: Runner) -> None:
        self.before_save_in_all_ranks(runner)
        self._own_state = random_state()
        self._in_validation = True

    def after_val(self, runner: Runner) -> None:
        self._in_validation = False
        set_random_state(self._own_state)

    def before_save_in_all_ranks(self, runner: Runner) -> None:
        if not self._in_validation:  # in validation, keep the states from before it
            self._states = dist.all_gather_object(random_state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._states is None or 'optimizer' not in checkpoint:
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        whole_epoch = not by_epoch or checkpoint['meta']['epoch'] > self._epoch
        checkpoint.setdefault(RESUME, {}).update(
            random_states=self._states,
            batch_size=runner.train_dataloader.batch_sampler.batch_size,
            batches_of_epoch=0 if whole_epoch else checkpoint['meta']['iter'] - self._epoch_start,
        )

    def _restore(self, runner: Runner) -> None:
        states = self._resumed.get('random_states')
        if states is None:
            return
        if len(states) != dist.get_world_size():
            runner.logger.warning(
                f'The checkpoint is of {len(states)} processes and this run of '
                f'{dist.get_world_size()}: it continues, but will differ from an uninterrupted one'
            )
            return
        try:
            set_random_state(states[dist.get_rank()])
        except Exception as error:  # noqa: BLE001 - a damaged state fails in many ways
            raise CheckpointError(
                f'{private.load_from(runner)}: the random states in it are damaged ({error}): '
                'resume from another checkpoint'
            ) from error

    def _require_within_an_epoch(
        self, runner: Runner, done: int, batches: '_ResumedBatches'
    ) -> None:
        states, size = self._resumed.get('random_states'), self._resumed.get('batch_size')
        is_same = size == batches.batch_size and len(states or ()) == dist.get_world_size()
        if is_same and done > len(batches):
            raise CheckpointError(
                f'{private.load_from(runner)}: polynext_resume.batches_of_epoch is {done}, and an '
                f'epoch of this run has {len(batches)} batches: resume with the data of the '
                'checkpoint, or give it as load_from without --resume'
            )

    def _warn_of_another_batch_size(self, runner: Runner, size: int) -> None:
        saved = self._resumed.get('batch_size') or size
        if saved != size:
            runner.logger.warning(
                f'The checkpoint is of batches of {saved} per process and this run has batches of '
                f'{size}: it continues, but will differ from an uninterrupted one'
            )


def _reproducible(cfg: Any, loader: DataLoader, seed: int, by_epoch: bool) -> DataLoader:
    """Rebuild the loader of a config with samplers that are seeded, numbered and can skip.

    Raises:
        ValueError: If the samplers cannot be built again, or the data set has no indices.
    """
    if not isinstance(cfg, dict) or not isinstance(cfg.get('sampler'), dict):
        raise ValueError(
            'ReproducibilityHook builds the sampler itself: give train_dataloader, and its '
            'sampler, as dicts of the config'
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            'ReproducibilityHook numbers the samples of a data set: it cannot number those of '
            f'{type(loader.dataset).__name__}, which has no indices'
        )
    # a resumed run without a seed gets it from the checkpoint, after its loader was built
    sampler = _NumberedSampler(
        DATA_SAMPLERS.build(
            dict(cfg['sampler']), default_args=dict(dataset=loader.dataset, seed=seed)
        )
    )
    if cfg.get('batch_sampler'):
        batches = DATA_SAMPLERS.build(
            dict(cfg['batch_sampler']),
            default_args=dict(sampler=sampler, batch_size=cfg['batch_size']),
        )
    else:
        batches = BatchSampler(sampler, cfg['batch_size'], loader.drop_last)
    workers = {}
    if loader.num_workers:
        workers = dict(
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            multiprocessing_context=loader.multiprocessing_context,
        )
    return DataLoader(
        _SeededDataset(loader.dataset, seed),
        batch_sampler=_ResumedBatches(batches, endless=not by_epoch),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        # a new iterator draws a random number: do not take it from the model's generator
        generator=torch.Generator().manual_seed(seed),
        **workers,
    )


def _validate_if_due(runner: Runner, done: int) -> None:
    """Validate after ``done`` epochs or iterations if the train loop would have done so."""
    loop = runner.train_loop
    private.decide_val_interval(loop)
    last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
    if (
        runner.val_loop is not None
        and done >= max(loop.val_begin, 1)
        and (done % loop.val_interval == 0 or done == last)
    ):
        runner.logger.info('The validation of the checkpoint had not been finished: it is done now')
        runner.val_loop.run()
