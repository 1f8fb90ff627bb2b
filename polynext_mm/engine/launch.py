"""From a config file to a running Runner: what training and evaluation share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from ..compat import check_stack
from ..compat.logs import say, without_noise
from ..resources import find_config
from ..weights import CheckpointError
from ..written import REFUSALS
from . import console
from .checkpoints.saving import NonFiniteError
from .checkpoints.work_dir import WorkDirInUseError, lock
from .checks import checkpoint as checkpoint_checks
from .checks import config as config_checks
from .checks import data as data_checks
from .checks.findings import DataError
from .interruption import LostWorkerError

# environment variables in which launchers pass the rank
_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}

# By a part of the data root: where to get the data set, and its layout.
_SOURCES = {
    'ADEChallengeData2016': (
        'ADE20K (scene parsing benchmark): http://sceneparsing.csail.mit.edu, '
        'ADEChallengeData2016.zip',
        'images/training/*.jpg        annotations/training/*.png\n'
        'images/validation/*.jpg      annotations/validation/*.png',
    ),
    'coco': (
        'COCO 2017: https://cocodataset.org, train2017.zip, val2017.zip, '
        'annotations_trainval2017.zip',
        'train2017/*.jpg  val2017/*.jpg\nannotations/instances_train2017.json  '
        'annotations/instances_val2017.json',
    ),
    'cityscapes': (
        'Cityscapes: https://www.cityscapes-dataset.com, leftImg8bit_trainvaltest.zip and '
        "gtFine_trainvaltest.zip, then mmseg's tools/dataset_converters/cityscapes.py",
        'leftImg8bit/train/*/*_leftImg8bit.png  gtFine/train/*/*_gtFine_labelTrainIds.png\n'
        'leftImg8bit/val/*/*_leftImg8bit.png    gtFine/val/*/*_gtFine_labelTrainIds.png',
    ),
    'VOC2012': (
        'Pascal VOC 2012: http://host.robots.ox.ac.uk/pascal/VOC/voc2012, '
        'VOCtrainval_11-May-2012.tar, '
        "and SBD's labels by mmseg's tools/dataset_converters/voc_aug.py",
        'JPEGImages/*.jpg        ImageSets/Segmentation/train.txt, val.txt, aug.txt\n'
        'SegmentationClass/*.png SegmentationClassAug/*.png',
    ),
    'VOC2010': (
        'PASCAL Context: http://host.robots.ox.ac.uk/pascal/VOC/voc2010, '
        'VOCtrainval_03-May-2010.tar, '
        "and its labels by mmseg's tools/dataset_converters/pascal_context.py",
        'JPEGImages/*.jpg               ImageSets/SegmentationContext/train.txt, val.txt\n'
        'SegmentationClassContext/*.png',
    ),
    'materials/scenes': (
        'the sample of the demos: `python demo/make_materials.py` makes it in a clone',
        'images/training/*.jpg  annotations/training/*.png  annotations/instances_training.json',
    ),
}


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """DistributedDataParallel on the CPU, with BN in place of SyncBN, which needs GPUs."""

    def __init__(self, module: nn.Module, **options):
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            say('SyncBN needs GPUs: on the CPU it becomes BN, with statistics per process')
            module = revert_sync_batchnorm(module)
        super().__init__(module, **options)


class DatasetNotFoundError(FileNotFoundError):
    """The data set of a config is not where the config says it is."""


def require_dataset(dataset: ConfigDict) -> None:
    """Check that the folders and the annotation files of a dataset config exist.

    Args:
        dataset: The settings of a data set, or of a wrapper around one or several.

    Raises:
        DatasetNotFoundError: If one is missing; the message gives its path, the expected layout,
            where to get the data, and which demo runs without it.
    """
    for _, settings in config_checks.datasets_of(dataset, 'dataset'):
        _require_files(settings)


def _require_files(dataset: Mapping) -> None:
    root = Path(dataset.get('data_root') or '')
    prefix = dataset.get('data_prefix') or {}
    needed = [root / part for part in (dataset.get('ann_file'), *prefix.values()) if part]
    missing = next((path for path in needed or [root] if not path.exists()), None)
    if missing is None:
        return
    source, layout = next(
        (value for name, value in _SOURCES.items() if name in str(root)),
        ('your own data set', '\n'.join(map(str, needed))),
    )
    indented = '\n'.join(f'      {line}' for line in layout.splitlines())
    demo = 'make demo-detection' if 'coco' in str(root) else 'make demo'
    raise DatasetNotFoundError(
        f'there is no {missing.absolute()}\n'
        f'  data set: {source}\n'
        f'  expected below {root.absolute()}:\n{indented}\n'
        '  if it is elsewhere: link it there, or pass --cfg-options data_root=FOLDER\n'
        f'  without it: `{demo}` trains on a sample that is part of this repository'
    )


def init_distributed(launcher: str, cfg: Config) -> None:
    """Set up the process group of a launcher, and the model wrapper that goes with it.

    With GPUs, mmengine does this. Without, mmengine would still call CUDA, so this sets up gloo and
    puts a model wrapper for the CPU into ``cfg``.

    Raises:
        ConfigError: If the launcher did not start this process.
        ValueError: If there are no GPUs and the launcher is neither 'pytorch' nor 'slurm'.
    """
    cfg.launcher = launcher
    if launcher in _RANKS and _RANKS[launcher] not in os.environ:
        raise config_checks.ConfigError(
            f'--launcher {launcher} is for a process that it started, and {_RANKS[launcher]} is '
            'not set: start several with tools/dist_train.sh or tools/dist_test.sh, or leave '
            '--launcher out for one'
        )
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher == 'slurm':
        os.environ.setdefault('RANK', os.environ['SLURM_PROCID'])
        os.environ.setdefault('LOCAL_RANK', os.environ['SLURM_LOCALID'])
        os.environ.setdefault('WORLD_SIZE', os.environ['SLURM_NTASKS'])
        os.environ.setdefault('MASTER_ADDR', os.environ['SLURM_LAUNCH_NODE_IPADDR'])
        os.environ.setdefault('MASTER_PORT', '29500')
    elif launcher != 'pytorch':
        raise ValueError(f'launcher {launcher!r} needs GPUs: on CPUs use pytorch or slurm')
    timeout = cfg.env_cfg.get('dist_cfg', {}).get('timeout', 1800)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=timeout))
    cfg.model_wrapper_cfg = {
        'type': 'CPUDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'device_ids': None,
    }


def read_config(args: argparse.Namespace) -> Config:
    """Return the config that the arguments name, with the settings that they override.

    ``args.file_keys`` is set to the top-level names of the config file, to tell them from those
    that the command line adds.

    Raises:
        ConfigNotFoundError: If there is no such config.
        ConfigError: If ``data_root`` is overridden and no data set of the config is below it.
    """
    args.config = find_config(args.config)
    with without_noise():  # from custom_imports
        cfg = Config.fromfile(args.config)
    args.file_keys = set(cfg.keys())
    _override(cfg, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def load_config(name: str, cfg_options: Mapping | None) -> Config:
    """Return the config with this name or path, with settings overridden.

    Raises:
        ConfigNotFoundError: If there is no such config.
        ConfigError: If ``data_root`` is overridden and no data set of the config is below it.
    """
    with without_noise():  # from custom_imports
        cfg = Config.fromfile(find_config(name))
    _override(cfg, cfg_options)
    return cfg


def _override(cfg: Config, cfg_options: Mapping | None) -> None:
    """Apply the overrides of the command line; ``data_root`` moves the data sets."""
    if cfg_options is not None:
        if 'data_root' in cfg_options:
            _move_data(cfg, str(cfg_options['data_root']))
        config_checks.override(cfg, cfg_options)


def _move_data(cfg: Config, new_root: str) -> None:
    """Replace ``cfg.data_root`` in the paths of all dataloaders and evaluators.

    Dataloaders copy the variable ``data_root`` when the config file is read, so overriding the
    variable alone would change nothing. Without the variable, the root that all data sets share is
    moved.
    """
    has_variable = 'data_root' in cfg
    old_root = str((cfg.data_root if has_variable else _shared_root(cfg)) or '')
    parts = [key for key in cfg if key.endswith(('_dataloader', '_evaluator'))]
    moved = {key: _moved(cfg[key], old_root, new_root) for key in parts}
    moves = any(moved[key] != cfg[key] for key in parts if key.endswith('_dataloader'))
    if not old_root or not (moves or new_root == old_root):
        why = (
            f'no dataloader of {cfg.filename} reads from its data_root, {old_root!r}'
            if has_variable
            else f'the data sets of {cfg.filename} have no common data_root'
        )
        raise config_checks.ConfigError(
            f'--cfg-options data_root={new_root}: {why}: set train_dataloader.dataset.data_root, '
            'val_dataloader.dataset.data_root and so on instead'
        )
    cfg.merge_from_dict(moved)


def _shared_root(cfg: Config) -> str | None:
    """Return the ``data_root`` of all data sets of a config; None if they have several."""
    roots = {
        settings.get('data_root')
        for task in config_checks.TASKS
        for _, settings in config_checks.datasets_of(
            (cfg.get(f'{task}_dataloader') or {}).get('dataset'), task
        )
    }
    return roots.pop() if len(roots) == 1 else None


def _moved(setting: Any, old_root: str, new_root: str) -> Any:
    """Return a copy of ``setting`` with paths at or below ``old_root`` moved to ``new_root``."""
    if isinstance(setting, Mapping):
        return {key: _moved(value, old_root, new_root) for key, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        return type(setting)(_moved(value, old_root, new_root) for value in setting)
    if isinstance(setting, str):
        folder = old_root.rstrip('/')
        if setting.rstrip('/') == folder:
            return new_root
        if setting.startswith(f'{folder}/'):
            return os.path.join(new_root, setting.removeprefix(f'{folder}/'))
    return setting


def set_timeout(cfg: Config, seconds: float) -> None:
    """End the run when one of its processes makes no progress for ``seconds``."""
    cfg.custom_hooks = [
        hook
        for hook in cfg.get('custom_hooks') or []
        if not (isinstance(hook, Mapping) and hook.get('type') == 'WatchdogHook')
    ]
    cfg.custom_hooks.append(dict(type='WatchdogHook', timeout=seconds))
    # time out before NCCL or gloo, which cannot name the rank
    cfg.merge_from_dict({'env_cfg.dist_cfg.timeout': int(seconds) + 60})


def run(cfg: Config, args: argparse.Namespace, task: str, datasets: Sequence[str]) -> None:
    """Run a task of a config's Runner, reading every checkpoint safely.

    If a file is missing or a checkpoint does not fit, exit with only that message.

    Args:
        cfg: The config; its ``runner_type`` selects a Runner other than mmengine's.
        args: Arguments of ``polynext-mm train`` or ``test``, after :func:`read_config`.
        task: The Runner's method, 'train' or 'test'.
        datasets: Names of the dataloaders whose files must exist.
    """
    check_stack()
    # report a full disk once, where it matters, not for every log line
    logging.raiseExceptions = False
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        if args.unchecked:
            data_checks.without_checks(cfg)
        else:
            config_checks.check_config(cfg, args.file_keys, args.cfg_options)
        for name in datasets:
            if cfg.get(name):
                require_dataset(cfg[name].dataset)
        init_distributed(args.launcher, cfg)
        # before the Runner writes its config
        if task == 'train' and os.environ.get(_RANKS.get(args.launcher, ''), '0') == '0':
            lock(cfg.work_dir)
        with contextlib.ExitStack() as stack:
            if not args.verbose:
                stack.enter_context(console.quiet(cfg.get('default_scope')))
            kind = Runner if args.verbose else console.QuietRunner
            if task != 'train':
                kind = type(kind.__name__, (_KeepsConfig, kind), {})
            runner = RUNNERS.build(cfg) if 'runner_type' in cfg else kind.from_cfg(cfg)
            if not args.unchecked:
                checkpoint_checks.check_checkpoint(runner, task)
                data_checks.check_before_data(runner, task)
            getattr(runner, task)()
        _leave_distributed()
    except SystemExit:  # interrupted, in all processes
        _leave_distributed()
        raise
    except (
        CheckpointError,
        config_checks.ConfigError,
        DataError,
        LostWorkerError,
        NonFiniteError,
        WorkDirInUseError,
    ) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    except OSError as error:
        if error.errno is not None and error.errno not in REFUSALS:
            raise
        where = '' if error.filename or error.errno is None else f' (work dir {cfg.work_dir})'
        sys.exit(f'{type(error).__name__}: {error}{where}')


class _KeepsConfig:
    """Leave the config in a work dir as the training wrote it.

    An evaluation's has the model of --tta and the files of --out, but whoever names the work dir
    means the training's config. mmengine keeps a copy of the former beside the evaluation's log.
    """

    def dump_config(self) -> None:
        pass


def _leave_distributed() -> None:
    """Leave the process group: gloo's threads abort a process that exits as a member."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
