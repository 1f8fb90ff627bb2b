"""Two processes: resumed bit for bit, ended with their launcher, named when they freeze.

Together they train as one does.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.engine.runs import config, differences, saved
from tests.helpers.files import ROOT
from tests.helpers.programs import free_port, python

DIST_TRAIN = ROOT / 'tools' / 'dist_train.sh'


def written(cfg: Config, path: Path) -> Path:
    """A config as a file of its own."""
    cfg.dump(path)
    return path


def launch(cfg_file: Path, *arguments, **env: str) -> subprocess.Popen:
    """Two processes by tools/dist_train.sh."""
    return subprocess.Popen(
        [str(part) for part in (DIST_TRAIN, cfg_file, 2, '--verbose', *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHON': sys.executable,
            'PORT': str(free_port()),
            **env,
        },
    )


def finish(launcher: subprocess.Popen) -> None:
    printed = launcher.communicate()[0]
    assert launcher.returncode == 0, printed


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The processes that train, by rank."""
    found = {}
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if int((process / 'stat').read_text().rsplit(')', 1)[1].split()[1]) == launcher.pid:
                environment = (process / 'environ').read_bytes().split(b'\0')
                rank = next(line for line in environment if line.startswith(b'RANK='))
                found[int(rank[5:])] = int(process.name)
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]


def printed_until(launcher: subprocess.Popen, text: str) -> str:
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if text in line:
            return ''.join(lines)
    raise AssertionError(f'{text!r} was not printed:\n' + ''.join(lines))


def endless(task: str, work_dir: Path) -> Config:
    return config(
        task,
        work_dir,
        iters=100000,
        **{
            'param_scheduler': [],
            'train_cfg.val_interval': 10**6,
            'default_hooks.checkpoint.interval': 10**6,
            'default_hooks.logger.interval': 1,
        },
    )


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = (Path('/proc') / str(pid) / 'stat').read_text().rsplit(')', 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in 'ZX':
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'by_epoch'), [('segmentation', False), ('detection', True)])
def test_two_processes_resume_bit_for_bit(tmp_path, task, by_epoch):
    """With a signal in the midst: the launcher says 75, and resuming ends where no signal does."""
    options = {'train_dataloader.num_workers': 2, 'default_hooks.logger.interval': 1}
    if by_epoch:  # of one iteration
        options |= dict(by_epoch=True, iters=12)
        name, moment = 'epoch_12.pth', 'Epoch(train)  [3]'
    else:
        options |= {
            'iters': 12,
            'train_cfg.val_interval': 6,
            'default_hooks.checkpoint.interval': 6,
        }
        name, moment = 'iter_12.pth', 'Iter(train) [ 3/12]'
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    cfg_file = written(config(task, whole, **options), tmp_path / 'run.py')
    finish(launch(cfg_file, '--work-dir', whole))
    stopped = launch(cfg_file, '--work-dir', cut)
    printed_until(stopped, moment)
    stopped.send_signal(signal.SIGTERM)
    printed = stopped.communicate()[0]
    assert stopped.returncode == 75, printed
    assert not (cut / name).exists()
    finish(launch(cfg_file, '--work-dir', cut, '--resume'))
    assert differences(saved(cut / name), saved(whole / name)) == []


@pytest.mark.slow
@pytest.mark.parametrize('method', ['forkserver', 'spawn'])
def test_a_training_ends_however_its_workers_were_started(tmp_path, method):
    options = {
        'train_dataloader.num_workers': 1,
        'train_dataloader.persistent_workers': True,
        'env_cfg.mp_cfg.mp_start_method': method,
    }
    cfg = config('segmentation', tmp_path / 'work', iters=2, **options)
    python(ROOT / 'tools' / 'train.py', written(cfg, tmp_path / 'run.py'))
    assert (tmp_path / 'work' / 'iter_2.pth').is_file()


@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path):
    cfg_file = written(endless('segmentation', tmp_path / 'work'), tmp_path / 'run.py')
    launcher = launch(cfg_file)
    printed_until(launcher, 'Iter(train)')
    ranks = ranks_of(launcher)
    launcher.kill()
    assert len(ranks) == 2 and all(gone(rank) for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [0.0, 0.5])
def test_ranks_end_with_a_launcher_that_is_killed_as_they_start(tmp_path, seconds):
    cfg_file = written(endless('segmentation', tmp_path / 'work'), tmp_path / 'run.py')
    launcher = launch(cfg_file)
    ranks = []
    while len(ranks) < 2:
        assert launcher.poll() is None
        ranks = ranks_of(launcher)
    time.sleep(seconds)
    launcher.kill()
    assert all(gone(rank) for rank in ranks)


@pytest.mark.heavy
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_rank_whose_launcher_is_gone_starts_nothing(tool):
    environment = {'TORCHELASTIC_RUN_ID': 'none', 'POLYNEXT_LAUNCHER': '1'}
    printed = python(ROOT / 'tools' / f'{tool}.py', succeeds=False, **environment)
    assert printed == 'the launcher, process 1, is gone: nothing is started without it\n'


@pytest.mark.slow
@pytest.mark.parametrize('frozen', [0, 1])
def test_a_frozen_rank_ends_the_run_and_is_named(tmp_path, frozen):
    cfg_file = written(endless('segmentation', tmp_path / 'work'), tmp_path / 'run.py')
    launcher = launch(cfg_file, '--timeout', 15)
    printed_until(launcher, 'Iter(train)')
    os.kill(ranks_of(launcher)[frozen], signal.SIGSTOP)
    printed = launcher.communicate()[0]
    assert launcher.returncode not in (0, 75)
    named = re.search(r'no progress for 15 seconds: (.*) stands still', printed)[1]
    assert named.startswith(f'rank {frozen} (last seen ') and f'rank {1 - frozen}' not in named


# Two processes are one

EXACT = {
    'segmentation': {
        'model.backbone.drop_path_rate': 0.0,
        'model.decode_head.dropout_ratio': 0.0,
        'model.auxiliary_head.dropout_ratio': 0.0,
        'model.decode_head.norm_cfg': dict(type='BN', requires_grad=True, eps=1e-3),
    },
    'detection': {'model.backbone.drop_path_rate': 0.0},
}
FREEZE_BN = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn


@HOOKS.register_module()
class FreezeBN(Hook):
    def before_train_iter(self, runner, **step):
        for module in runner.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
"""


@pytest.mark.slow
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_two_processes_train_the_weights_of_one(tmp_path, task):
    """With the same batches, which the numbering of samples gives: two of 2 against one of 4."""
    (tmp_path / 'freeze_bn.py').write_text(FREEZE_BN)
    options = EXACT[task] | {
        'train_cfg.val_interval': 100,
        'default_hooks.checkpoint.interval': 100,
        'train_dataloader.dataset.indices': 8,
        'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.05, momentum=0.9),
        'param_scheduler': [],
    }
    results = []
    for name, batch in (('one', 4), ('two', 2)):
        cfg = config(task, tmp_path / name, iters=4, **options)
        cfg.train_dataloader.batch_size = batch
        cfg.custom_hooks.append(dict(type='FreezeBN'))
        cfg.custom_imports.imports.append('freeze_bn')
        cfg_file = written(cfg, tmp_path / f'{name}.py')
        path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
        if name == 'one':
            python(ROOT / 'tools' / 'train.py', cfg_file, PYTHONPATH=path)
        else:
            finish(launch(cfg_file, PYTHONPATH=path))
        results.append(saved(tmp_path / name / 'iter_4.pth'))
    one, two = results
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value, rtol=1e-4, atol=1e-5, msg=key)
    # with SGD these are sums of the gradients
    sums = [[s['momentum_buffer'] for s in run['optimizer']['state'].values()] for run in results]
    assert sum(bool(value.any()) for value in sums[0]) > 0.9 * len(sums[0])
    for value, other in zip(*sums):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
