"""From a config to a Runner, on whatever machine: what tools/train.py and tools/test.py share."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from ..weights import CheckpointError, safe_reading
from .checkpointing import NonFiniteError
from .interruption import end_with_launcher
from .work_dir import WorkDirInUseError, lock

# where launchers say which process this is
_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}

# what a disk or a folder refuses
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
)

# data sets by a part of their root, and where they come from
_SOURCES = {
    'ADEChallengeData2016': (
        'ADE20K (scene parsing benchmark): http://sceneparsing.csail.mit.edu, ADEChallengeData2016.zip',
        'images/training/*.jpg        annotations/training/*.png\n'
        'images/validation/*.jpg      annotations/validation/*.png',
    ),
    'coco': (
        'COCO 2017: https://cocodataset.org, train2017.zip, val2017.zip, annotations_trainval2017.zip',
        'train2017/*.jpg  val2017/*.jpg\nannotations/instances_train2017.json  '
        'annotations/instances_val2017.json',
    ),
}


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """DDP on the CPU, where there is no SyncBN: it is BN there, each process for itself."""

    def __init__(self, module: nn.Module, **options):
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            print_log(
                'SyncBN works on GPUs alone: on the CPU it is BN, each process for itself',
                logger='current',
            )
            module = revert_sync_batchnorm(module)
        super().__init__(module, **options)


class DatasetNotFoundError(FileNotFoundError):
    """The data set of a config is not where the config says."""


def require_dataset(dataset: ConfigDict) -> None:
    """Check that the folder and the annotation file of a dataset config exist.

    Raises:
        DatasetNotFoundError: If not, with the path looked at, the layout expected, the source of the
            data, and what runs without it.
    """
    while 'dataset' in dataset:  # wrappers
        dataset = dataset['dataset']
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
        f'  looked for: {source}\n'
        f'  expected below {root.absolute()}:\n{indented}\n'
        '  elsewhere: link it there, or set data_root of the dataloaders with --cfg-options\n'
        f'  without the data set: `{demo}` trains on a sample that is part of this repository'
    )


def init_distributed(launcher: str, cfg: Config) -> None:
    """Join the processes of a launcher.

    With GPUs mmengine does it. Without, mmengine would call CUDA all the same, so gloo is set up here,
    and the model gets a wrapper that needs none.

    Raises:
        ValueError: For a launcher that is not known on the CPU.
    """
    cfg.launcher = launcher
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher == 'slurm':
        os.environ.setdefault('RANK', os.environ['SLURM_PROCID'])
        os.environ.setdefault('LOCAL_RANK', os.environ['SLURM_LOCALID'])
        os.environ.setdefault('WORLD_SIZE', os.environ['SLURM_NTASKS'])
        os.environ.setdefault('MASTER_ADDR', os.environ['SLURM_LAUNCH_NODE_IPADDR'])
        os.environ.setdefault('MASTER_PORT', '29500')
    elif launcher != 'pytorch':
        raise ValueError(f'launcher {launcher!r} needs GPUs: without any, use pytorch or slurm')
    timeout = cfg.env_cfg.get('dist_cfg', {}).get('timeout', 1800)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=timeout))
    cfg.model_wrapper_cfg = {
        'type': 'CPUDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'device_ids': None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and evaluation share."""
    parser.add_argument('--work-dir', help='for logs and results (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of the config to override, as key=value',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(args: argparse.Namespace) -> Config:
    """The config that the arguments name, with the settings that they override."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def set_timeout(cfg: Config, seconds: float) -> None:
    """Let the run end when one of its processes stands still for so long."""
    hooks = cfg.get('custom_hooks', [])
    cfg.custom_hooks = [hook for hook in hooks if hook['type'] != 'WatchdogHook']
    cfg.custom_hooks.append(dict(type='WatchdogHook', timeout=seconds))
    # the watchdog, which knows names, speaks before the collectives do, which know none
    cfg.merge_from_dict({'env_cfg.dist_cfg.timeout': int(seconds) + 60})


def run(cfg: Config, args: argparse.Namespace, task: str, datasets: Sequence[str]) -> None:
    """Let the Runner of a config do its task, with every checkpoint read safely; end the program with
    one message where a file is missing or a checkpoint does not fit.

    Args:
        cfg (Config): Names the Runner's type, if it is not mmengine's own.
        args (argparse.Namespace): Of :func:`add_arguments`.
        task (str): The Runner's method, 'train' or 'test'.
        datasets (Sequence[str]): Dataloaders whose data must be there.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    end_with_launcher()
    try:
        for name in datasets:
            if cfg.get(name):
                require_dataset(cfg[name].dataset)
        init_distributed(args.launcher, cfg)
        # before the Runner writes its config
        if task == 'train' and os.environ.get(_RANKS.get(args.launcher, ''), '0') == '0':
            lock(cfg.work_dir)
        with safe_reading():
            runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
            getattr(runner, task)()
        _leave_distributed()
    except SystemExit:  # interrupted, in all processes
        _leave_distributed()
        raise
    except (CheckpointError, NonFiniteError, WorkDirInUseError) as error:
        sys.exit(f'{type(error).__name__}: {error}')
    except OSError as error:
        if error.errno is not None and error.errno not in _REFUSALS:
            raise
        where = '' if error.filename or error.errno is None else f' (work dir {cfg.work_dir})'
        sys.exit(f'{type(error).__name__}: {error}{where}')


def _leave_distributed() -> None:
    """Part from the other processes: gloo's threads abort a process that ends without."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
