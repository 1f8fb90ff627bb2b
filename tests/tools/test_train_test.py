"""tools/train.py and tools/test.py, alone and in several processes, as a user runs them."""

import csv
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from polynext_mm.commands import train
from tests.helpers.checkpoints import imagenet_weights, segmentor_file
from tests.helpers.configs import (
    TINY_NETWORK,
    as_arguments,
    config_to_load_into,
    tiny_config,
    tiny_options,
)
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.programs import call_tool, free_port, python, run
from tests.helpers.samples import ade20k_scenes, sample_as_ade20k

TOOLS = ROOT / 'tools'
IMAGES = 4
LOG_ALL = {'default_hooks.logger.interval': 1}


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    """A config as of a user: the published one with the tiny network, on generated images."""
    folder = tmp_path_factory.mktemp('config')
    path = folder / 'mine.py'
    cfg = tiny_config(sample_as_ade20k(folder, IMAGES), '', **TINY_NETWORK)
    cfg.pop('work_dir')
    cfg.dump(path)
    return path


@pytest.fixture(scope='module')
def trained(config_file, tmp_path_factory):
    """The work dir of a training of two iterations, and what the training printed."""
    work_dir = tmp_path_factory.mktemp('work')
    options = LOG_ALL | dict.fromkeys(
        ('train_cfg.max_iters', 'train_cfg.val_interval', 'default_hooks.checkpoint.interval'), 2
    )
    command = (TOOLS / 'train.py', config_file, '--work-dir', work_dir, '--verbose')
    return work_dir, python(*command, *as_arguments(options), cwd=work_dir)


def run_tool(name: str, *arguments) -> None:
    assert call_tool(name, *arguments) is None


def log_of(work_dir: Path) -> str:
    return max(work_dir.glob('*/*.log')).read_text()


def metrics(printed) -> dict[str, float]:
    last = printed.split('Iter(')[-1]
    return {name: float(value) for name, value in re.findall(r'(aAcc|mIoU|mAcc): ([\d.]+)', last)}


@pytest.mark.heavy
def test_training_steps_evaluates_and_saves(trained):
    work_dir, printed = trained
    assert 'Parameter groups:' in printed
    assert metrics(printed).keys() == {'aAcc', 'mIoU', 'mAcc'}
    content = torch.load(work_dir / 'iter_2.pth', weights_only=False)
    assert content['meta']['iter'] == 2
    assert {int(state['step']) for state in content['optimizer']['state'].values()} == {2}
    weights = content['state_dict']
    assert all(value.isfinite().all() for value in weights.values())
    assert weights['decode_head.psp_modules.0.1.bn.num_batches_tracked'] == 2


@pytest.mark.heavy
def test_training_and_evaluation_say_how_long_they_will_take(trained, evaluated):
    eta = r'.* eta: \d+:\d\d:\d\d '
    assert re.search(r'Iter\(train\) \[1/2\]' + eta, trained[1])
    assert re.search(rf'Iter\(val\) \[1/{IMAGES}\]' + eta, trained[1])
    assert re.search(rf'Iter\(test\) \[1/{IMAGES}\]' + eta, evaluated[1])


@pytest.mark.heavy
def test_resuming_goes_on_from_the_latest(trained, config_file, tmp_path):
    work_dir = tmp_path / 'work'
    shutil.copytree(trained[0], work_dir)
    options = {'train_cfg.max_iters': 3, 'default_hooks.checkpoint.interval': 3}
    options |= dict(val_cfg=None, val_dataloader=None, val_evaluator=None)
    run_tool('train', config_file, '--work-dir', work_dir, '--resume', *as_arguments(options))
    assert 'resumed epoch: 0, iter: 2' in log_of(work_dir)
    before, after = (torch.load(work_dir / f'iter_{i}.pth', weights_only=False) for i in (2, 3))
    assert after['meta']['iter'] == 3
    assert {int(state['step']) for state in after['optimizer']['state'].values()} == {3}
    assert (
        after['param_schedulers'][1]['last_step'] == before['param_schedulers'][1]['last_step'] + 1
    )
    # A step at the first learning rates is tiny: these must be the weights from before.
    key = 'decode_head.conv_seg.weight'
    torch.testing.assert_close(
        after['state_dict'][key], before['state_dict'][key], atol=1e-5, rtol=0
    )


@pytest.fixture(scope='module')
def evaluated(trained, config_file, tmp_path_factory):
    """The folder of an evaluation, and its log."""
    folder = tmp_path_factory.mktemp('evaluation')
    run_tool(
        'test',
        config_file,
        trained[0] / 'iter_2.pth',
        '--work-dir',
        folder / 'work',
        '--out',
        folder / 'out',
        '--show-dir',
        folder / 'pictures',
        # of others in this process there may be a visualizer, which keeps its folder
        *as_arguments(LOG_ALL | {'visualizer.name': folder.name}),
    )
    return folder, log_of(folder / 'work')


@pytest.mark.heavy
def test_evaluation_repeats_that_of_training(trained, evaluated):
    assert metrics(evaluated[1]) == metrics(trained[1])
    assert next((evaluated[0] / 'work').glob('*/*.json')).is_file()
    assert set(path.name for path in evaluated[0].iterdir()) == {'work', 'out', 'pictures'}


@pytest.mark.heavy
@pytest.mark.parametrize('launcher', ['pytorch', 'slurm'])
def test_a_launcher_that_started_nothing(launcher, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = call_tool('train', config_file, '--launcher', launcher)
    assert message.startswith('ConfigError: ') and 'leave --launcher out' in message


@pytest.mark.heavy
def test_an_evaluation_leaves_the_config_of_the_training(trained, evaluated, tmp_path):
    """A work dir stands for it, and --tta and --out change the config."""
    work_dir = tmp_path / 'work'
    shutil.copytree(trained[0], work_dir)
    before = {path.name: path.read_bytes() for path in work_dir.glob('*.py')}
    arguments = ['--tta', '--out', tmp_path / 'out', '--work-dir', work_dir]
    run_tool('test', work_dir, *arguments, *as_arguments({'visualizer.name': 'kept'}))
    assert before and {path.name: path.read_bytes() for path in work_dir.glob('*.py')} == before


@pytest.mark.heavy
def test_predictions_are_kept_as_label_images(evaluated, config_file):
    root = Path(Config.fromfile(config_file).val_dataloader.dataset.data_root)
    images = {path.stem: path for path in (root / 'images' / 'validation').iterdir()}
    kept = sorted((evaluated[0] / 'out').iterdir())
    assert {path.stem for path in kept} == set(images)
    for path in kept:
        labels = np.asarray(Image.open(path))
        assert labels.shape == np.asarray(Image.open(images[path.stem])).shape[:2]
        assert 1 <= labels.min() <= labels.max() <= 150


@pytest.mark.heavy
def test_pictures_of_the_predictions_are_drawn(evaluated):
    pictures = list((evaluated[0] / 'pictures').rglob('*.png'))
    assert len(pictures) == IMAGES
    assert np.asarray(Image.open(pictures[0])).std() > 0


@pytest.mark.heavy
def test_tta_with_the_authors_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = ade20k_scenes()
    torch.save(segmentor_file(tiny_config(sample, ''), 'backbone._orig_mod.'), 'authors.pth')
    run_tool('test', CONFIG, 'authors.pth', '--tta', *as_arguments(tiny_options(sample)))
    log = log_of(tmp_path / 'work_dirs' / CONFIG.stem)
    assert re.search(r'PolyNeXt: loaded 393 of 393 tensors from authors.pth\n', log)
    assert re.search(r'EncoderDecoder heads: loaded (\d+) of \1 tensors', log)
    assert metrics(log).keys() == {'aAcc', 'mIoU', 'mAcc'}


def load_config(*arguments):
    return train.load_config(train.build_parser().parse_args(list(map(str, arguments))))


def test_flags_of_training():
    cfg = load_config(CONFIG)
    assert cfg.work_dir == f'work_dirs/{CONFIG.stem}'
    assert not cfg.resume and cfg.load_from is None and not cfg.auto_scale_lr.enable
    cfg = load_config(CONFIG, '--resume', 'some.pth', '--work-dir', 'there')
    assert cfg.resume and cfg.load_from == 'some.pth' and cfg.work_dir == 'there'
    cfg = load_config(CONFIG, '--resume', '--auto-scale-lr', '--cfg-options', 'load_from=other.pth')
    assert cfg.resume and cfg.load_from is None and cfg.auto_scale_lr.enable


def test_amp_is_bfloat16_autocast_for_configs_in_float32():
    options = ['--cfg-options', 'optim_wrapper.type=OptimWrapper', 'optim_wrapper.dtype=float32']
    assert load_config(CONFIG, *options).optim_wrapper.type == 'OptimWrapper'
    wrapper = load_config(CONFIG, '--amp', *options).optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ('AutocastOptimWrapper', 'bfloat16')


# Errors that explain themselves


def test_an_absent_ade20k_is_one_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('some.pth').touch()  # the data are looked for before it is read
    for arguments in (('train', CONFIG), ('test', CONFIG, 'some.pth')):
        message = call_tool(*arguments)
        assert len(message.splitlines()) < 15
        assert f'{tmp_path}/data/ade/ADEChallengeData2016/images/' in message
        assert 'images/training/*.jpg' in message and 'annotations/validation/*.png' in message
        assert 'ADEChallengeData2016.zip' in message
        assert '`make demo`' in message


def test_an_absent_data_set_of_ones_own_names_its_folders(tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    message = call_tool(
        'train',
        CONFIG,
        *as_arguments(
            {
                'train_dataloader.dataset.data_root': tmp_path / 'mine',
                'train_dataloader.dataset.data_prefix.img_path': elsewhere,
            }
        ),
    )
    assert message.startswith(f'DatasetNotFoundError: there is no {elsewhere}')
    assert f'{tmp_path}/mine/annotations/training' in message


@pytest.mark.heavy
def test_an_imagenet_file_cannot_be_evaluated(tmp_path):
    file = tmp_path / 'imagenet.pt'
    torch.save(imagenet_weights(), file)
    message = call_tool(
        'test',
        CONFIG,
        file,
        '--work-dir',
        tmp_path,
        *as_arguments(dict(tiny_options(ade20k_scenes()), **{'model.backbone.out_norm': False})),
    )
    assert str(file) in message and 'cannot be evaluated' in message


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('tool', 'arguments'), [('test', ['absent.pth']), ('train', ['--resume', 'absent.pth'])]
)
def test_an_absent_checkpoint(config_file, tmp_path, monkeypatch, tool, arguments):
    monkeypatch.chdir(tmp_path)
    message = call_tool(tool, config_file, *arguments)
    assert 'there is no checkpoint absent.pth' in message and str(tmp_path) in message


@pytest.mark.heavy
def test_a_batch_of_one_is_explained(tmp_path):
    config = config_to_load_into(
        ade20k_scenes(), tmp_path, **TINY_NETWORK, **{'train_dataloader.batch_size': 1}
    )
    runner = Runner.from_cfg(config)
    with pytest.raises(
        ValueError, match=r'decode_head.psp_modules.0 pools each image to 1x1'
    ) as caught:
        runner.train()
    assert 'train_dataloader.batch_size=2' in str(caught.value)
    assert runner.iter == 0


# Several processes


@pytest.mark.heavy
def test_two_processes_train_and_evaluate(config_file, tmp_path):
    printed = run(
        TOOLS / 'dist_train.sh',
        config_file,
        2,
        '--work-dir',
        tmp_path / 'work',
        PYTHON=sys.executable,
        PORT=str(free_port()),
        cwd=tmp_path,
    )
    assert 'SyncBN needs GPUs' in printed
    assert metrics(printed).keys() == {'aAcc', 'mIoU', 'mAcc'}
    content = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)
    assert not any(key.startswith('module.') for key in content['state_dict'])
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert 'Distributed training: True' in log and 'GPU number: 2' in log
    _, *rows = csv.reader((tmp_path / 'work' / 'report' / 'classes.csv').open())
    data_root = Config.fromfile(config_file).val_dataloader.dataset.data_root
    labels = map(Image.open, (Path(data_root) / 'annotations' / 'validation').iterdir())
    assert sum(int(row[3]) for row in rows) == sum(np.count_nonzero(label) for label in labels)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(trained, evaluated, config_file, tmp_path):
    printed = run(
        TOOLS / 'dist_test.sh',
        config_file,
        trained[0] / 'iter_2.pth',
        2,
        '--verbose',
        '--work-dir',
        tmp_path,
        PYTHON=sys.executable,
        PORT=str(free_port()),
    )
    assert metrics(printed) == metrics(evaluated[1])


@pytest.fixture
def slurm(tmp_path):
    """The environment of a machine whose srun prints its arguments, one per line."""
    srun = tmp_path / 'bin' / 'srun'
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    return dict(PATH=f'{srun.parent}:{os.environ["PATH"]}', PYTHON='python')


@pytest.mark.heavy
def test_slurm_train(slurm):
    lines = run(
        TOOLS / 'slurm_train.sh',
        'part',
        'job',
        'my config.py',
        'work dir',
        '--amp',
        GPUS='16',
        GPUS_PER_NODE='8',
        SRUN_ARGS='--qos high',
        **slurm,
    ).splitlines()
    assert lines[:2] == ['-p', 'part'] and '--job-name=job' in lines
    assert {
        '--ntasks=16',
        '--gres=gpu:8',
        '--ntasks-per-node=8',
        '--cpus-per-task=5',
        '--qos',
        'high',
        '--kill-on-bad-exit=1',
    } <= set(lines)
    assert lines[lines.index('python') :] == [
        'python',
        '-u',
        str(TOOLS / 'train.py'),
        'my config.py',
        '--work-dir',
        'work dir',
        '--launcher',
        'slurm',
        '--amp',
    ]


@pytest.mark.heavy
def test_slurm_train_without_a_work_dir(slurm):
    printed = run(TOOLS / 'slurm_train.sh', 'part', 'job', 'config.py', '--resume', **slurm)
    assert printed.splitlines()[-4:] == ['config.py', '--launcher', 'slurm', '--resume']


@pytest.mark.heavy
def test_slurm_test_on_cpus(slurm):
    lines = run(
        TOOLS / 'slurm_test.sh',
        'part',
        'job',
        'config.py',
        'file.pth',
        '--tta',
        GPUS='2',
        GPUS_PER_NODE='0',
        CPUS_PER_TASK='3',
        **slurm,
    ).splitlines()
    assert not any('gres' in line for line in lines)
    assert {'--ntasks=2', '--cpus-per-task=3'} <= set(lines)
    assert lines[-6:] == [
        str(TOOLS / 'test.py'),
        'config.py',
        'file.pth',
        '--launcher',
        'slurm',
        '--tta',
    ]


@pytest.mark.heavy
@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_scripts_tell_their_usage(script):
    assert f'{script} ' in run(TOOLS / script, 'one', succeeds=False)


@pytest.mark.slow
def test_one_slurm_task_on_the_cpu_trains(slurm, config_file, tmp_path):
    srun = tmp_path / 'bin' / 'srun'
    srun.write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\n'
        'SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 '
        'SLURM_LAUNCH_NODE_IPADDR=127.0.0.1 exec "$@"\n'
    )
    settings = dict(slurm, PYTHON=sys.executable, MASTER_PORT=str(free_port()))
    printed = run(
        TOOLS / 'slurm_train.sh',
        'part',
        'job',
        config_file,
        tmp_path / 'work',
        **settings,
    )
    assert metrics(printed).keys() == {'aAcc', 'mIoU', 'mAcc'}


# The real thing


@pytest.mark.slow
def test_the_published_config_takes_a_step_as_it_is(tmp_path):
    """Model, heads, crop and optimizer are the recipe's; the weights cannot be downloaded here."""
    sample = sample_as_ade20k(tmp_path, 2)
    printed = python(
        TOOLS / 'train.py',
        ROOT / 'configs' / 'upernet_cpolynext_s_ade20k.py',
        '--verbose',
        '--work-dir',
        tmp_path / 'work',
        *as_arguments(
            {
                'train_dataloader.dataset.data_root': sample,
                'train_dataloader.batch_size': 2,
                'train_dataloader.num_workers': 0,
                'train_dataloader.persistent_workers': False,
                'model.backbone.init_cfg': None,
                'train_cfg.max_iters': 1,
                'val_cfg': None,
                'val_dataloader': None,
                'val_evaluator': None,
            }
        ),
    )
    assert 'Parameter groups:' in printed
    content = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)
    assert {int(state['step']) for state in content['optimizer']['state'].values()} == {1}
    assert content['state_dict']['decode_head.fpn_bottleneck.conv.weight'].shape == (
        512,
        2048,
        3,
        3,
    )
    assert all(value.isfinite().all() for value in content['state_dict'].values())
