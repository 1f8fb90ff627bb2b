"""The authors' files, in every container, on every path on which mm loads a checkpoint."""

import argparse

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner, load_checkpoint

from polynext_mm import weights
from polynext_mm.nn import PolyNeXtClassifier
from tests.helpers.checkpoints import (
    CONTAINERS,
    head_weights,
    imagenet_weights,
    is_golden,
    is_golden_and_normed,
    segmentor_file,
)
from tests.helpers.configs import (
    TINY_NETWORK,
    build_model,
    config_to_load_into,
    tiny_options,
)
from tests.helpers.files import CONFIG
from tests.helpers.networks import ARCH, build
from tests.helpers.programs import MM_PACKAGES, python_without
from tests.helpers.samples import ade20k_scenes


@pytest.fixture
def tiny(tmp_path):
    """The same of the tiny network, which saves."""
    return config_to_load_into(
        ade20k_scenes(),
        tmp_path / 'work',
        **TINY_NETWORK,
        **{'default_hooks.checkpoint.interval': 1},
    )


def mm_extras() -> dict:
    """What mm's checkpoints hold besides weights and meta."""
    losses = HistoryBuffer()
    losses.update(1.5)
    losses.update(np.float64(0.5))
    return dict(
        message_hub=dict(
            log_scalars={'train/loss': losses},
            runtime_info=dict(iter=3, loss=np.float32(0.5), done=np.bool_(True)),
            resumed_keys={'train/loss': True},
        ),
        optimizer=dict(
            state={0: dict(step=torch.tensor(3.0), exp_avg=torch.ones(2))},
            param_groups=[dict(lr=np.float64(1e-4), betas=(0.9, 0.999), params=[0])],
        ),
        param_schedulers=[dict(last_step=3, _global_step=4)],
        args=argparse.Namespace(seed=np.int64(0), sizes=np.arange(3)),
    )


# A backbone's own init_cfg


def from_init_cfg(path):
    """A backbone without output norms with the weights of a file."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = build(arch=ARCH, out_norm=False, init_cfg=init_cfg)
    backbone.init_weights()
    return backbone


@pytest.mark.parametrize('container', CONTAINERS)
def test_init_cfg_takes_every_container(path, container):
    torch.save(CONTAINERS[container](), path)
    assert is_golden(from_init_cfg(path))


@pytest.mark.parametrize(('as_list', 'prefix'), [(False, None), (True, None), (False, 'backbone.')])
def test_init_cfg_takes_a_segmentor_with_and_without_mms_prefix(tmp_path, config, as_list, prefix):
    path = tmp_path / 'segmentor.pth'
    torch.save(segmentor_file(config), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix=prefix)
    backbone = build(arch=ARCH, init_cfg=[init_cfg] if as_list else init_cfg)
    backbone.init_weights()
    assert is_golden_and_normed(backbone)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / 'weights.safetensors'
    save_file(imagenet_weights(), path)
    assert is_golden(from_init_cfg(path))


def test_safetensors_go_to_a_device_alone(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / 'weights.safetensors'
    save_file(imagenet_weights(), path)
    for device in ('cpu', torch.device('cpu'), None):
        assert weights.read(path, device)['state_dict']['backbone.stem.weight'].device.type == 'cpu'
    with pytest.raises(ValueError, match='map_location must be a device or None'):
        weights.read(path, {'cuda:1': 'cuda:0'})


# mmengine's load_checkpoint, the Runner's load_from, mmseg.apis


@pytest.mark.parametrize(
    ('container', 'zipped'), [('bare', True), ('averaged', True), ('model_ema', False)]
)
def test_load_checkpoint_takes_containers_and_the_older_format_of_torch(path, container, zipped):
    torch.save(CONTAINERS[container](), path, _use_new_zipfile_serialization=zipped)
    backbone = build(arch=ARCH, out_norm=False)
    load_checkpoint(backbone, str(path))
    assert is_golden(backbone)


@pytest.mark.heavy
def test_load_from_starts_a_training(config, path):
    torch.save(CONTAINERS['averaged'](), path)
    config.load_from = str(path)
    config.model.backbone.out_norm = False
    runner = Runner.from_cfg(config)
    runner.train()
    assert is_golden(runner.model.backbone)


# Whole segmentors


@pytest.mark.heavy
@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone._orig_mod.'])
def test_a_segmentor_file_brings_backbone_norms_and_heads(config, tmp_path, prefix):
    path = tmp_path / 'segmentor.pth'
    content = segmentor_file(config, prefix)
    torch.save(dict(content, **mm_extras()), path)

    def is_whole(model):
        state_dict = model.state_dict()
        return is_golden_and_normed(model.backbone) and all(
            torch.equal(state_dict[key], value) for key, value in head_weights(model).items()
        )

    from mmseg.apis import init_model

    options = {key: value for key, value in tiny_options('').items() if key.startswith('model.')}
    assert is_whole(init_model(str(CONFIG), str(path), device='cpu', cfg_options=options))

    config.load_from = str(path)
    runner = Runner.from_cfg(config)
    runner.load_or_resume()  # as tools/test.py does
    assert is_whole(runner.model)

    model = build_model(config)
    report = weights.load(model, path)
    assert is_whole(model)
    assert report.startswith('EncoderDecoder heads: loaded ')


@pytest.mark.heavy
def test_resuming_executes_no_config_of_the_file(tiny, tmp_path):
    """mmengine would execute ``meta['config']`` as Python."""
    trace = tmp_path / 'executed'
    Runner.from_cfg(tiny).train()
    path = tmp_path / 'work' / 'iter_1.pth'
    content = torch.load(path, weights_only=False)
    content['meta']['config'] = f'open({str(trace)!r}, "w").close()\n'
    torch.save(content, path)
    Config.fromstring(content['meta']['config'], file_format='.py')
    assert trace.exists(), 'this text is not what mmengine executes'
    trace.unlink()

    tiny.train_cfg.max_iters = 2
    for source in (str(path), f'unsafe:{path}'):
        tiny.load_from, tiny.resume = source, True
        runner = Runner.from_cfg(tiny)
        runner.train()
        assert runner.iter == 2
        assert not trace.exists()


@pytest.mark.heavy
def test_an_average_of_mms_hook_is_saved_and_resumed(tiny, tmp_path):
    tiny.custom_hooks.append(dict(type='EMAHook', momentum=0.5))
    tiny.param_scheduler = []
    tiny.train_cfg.max_iters = 2  # the first only starts the average
    Runner.from_cfg(tiny).train()
    path = tmp_path / 'work' / 'iter_2.pth'
    saved = torch.load(path, weights_only=False)
    averaged, last = saved['state_dict'], saved['ema_state_dict']
    key = 'backbone.stem.weight'
    assert not torch.equal(averaged[key], last[f'module.{key}'])

    model = build_model(tiny)
    weights.load(model, path)
    assert torch.equal(model.backbone.stem.weight, averaged[key])

    tiny.load_from, tiny.resume, tiny.train_cfg.max_iters = str(path), True, 3
    Runner.from_cfg(tiny).train()
    resumed = torch.load(tmp_path / 'work' / 'iter_3.pth', weights_only=False)
    half_way = (averaged[key] + resumed['ema_state_dict'][f'module.{key}']) / 2
    torch.testing.assert_close(resumed['state_dict'][key], half_way)


def test_read_keeps_what_resuming_needs(config, tmp_path):
    path = tmp_path / 'segmentor.pth'
    torch.save(dict(segmentor_file(config, config='raise SystemExit'), **mm_extras()), path)
    content = weights.read(path)
    assert set(content) == {
        'meta',
        'state_dict',
        'message_hub',
        'optimizer',
        'param_schedulers',
        'args',
    }
    assert content['meta'] == dict(epoch=0, iter=160000)
    assert content['message_hub']['log_scalars']['train/loss'].mean() == 1.0
    assert content['message_hub']['runtime_info']['loss'] == np.float32(0.5)
    assert list(content['args'].sizes) == [0, 1, 2]


# Torch alone


@pytest.mark.heavy
def test_reading_loading_and_converting_need_torch_alone(config, tmp_path):
    torch.save(dict(segmentor_file(config), **mm_extras()), tmp_path / 'segmentor.pth')
    torch.save(imagenet_weights(), tmp_path / 'imagenet.pt')
    (tmp_path / 'weights.safetensors').touch()
    program = """
        from polynext_mm import nn, weights

        content = weights.read('segmentor.pth')
        history = content['message_hub']['log_scalars']['train/loss']
        print(history._log_history.tolist(), content['args'].seed)
        print(weights.load(nn.PolyNeXt('cpolynext_t'), 'segmentor.pth'))
        print(weights.load(nn.PolyNeXtClassifier('cpolynext_t'), 'imagenet.pt'))
        print(weights.convert('segmentor.pth', 'ours.pth'))
        try:
            weights.read('weights.safetensors')
        except ImportError as error:
            print(error)
        print({'mmengine', 'torchvision'} & set(sys.modules))
    """
    lines = python_without({*MM_PACKAGES, 'safetensors'}, program, cwd=tmp_path).splitlines()
    assert lines[0] == '[1.5, 0.5] 0'
    assert lines[1].startswith('PolyNeXt: loaded 385 of 385 tensors from segmentor.pth; left over')
    assert lines[2].startswith('PolyNeXt: loaded 389 of 389 tensors from imagenet.pt')
    assert lines[3].startswith('ours.pth: cpolynext_t in our names, ')
    assert 'run `pip install safetensors`' in lines[4]
    assert lines[5] == 'set()'
    model = build_model(config)
    weights.load(model, tmp_path / 'ours.pth')
    assert is_golden_and_normed(model.backbone)


# Other networks


def test_a_classifier_takes_all_of_an_imagenet_file(path):
    torch.save(CONTAINERS['state_dict'](), path)
    network = PolyNeXtClassifier(ARCH)
    report = weights.load(network, path)
    total = len(network.state_dict())
    assert report == f'PolyNeXt: loaded {total} of {total} tensors from {path}'
    theirs = imagenet_weights()
    for ours, key in (
        ('head.norm.weight', 'norm.weight'),
        ('head.fc.bias', 'head.3.bias'),
        ('head.fc.weight', 'head.3.weight'),
    ):
        assert torch.equal(network.state_dict()[ours], theirs[key])
    assert torch.equal(network.head.proj.weight, theirs['proj.weight'].flatten(1))
