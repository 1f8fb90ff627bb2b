"""Nothing in a file is executed, whoever's it is."""

from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint

from polynext_mm import weights
from polynext_mm.weights import CheckpointError
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.configs import TINY_NETWORK, build_model, tiny_config
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.networks import ARCH, build
from tests.helpers.samples import ade20k_scenes
from tests.weights.hostile import EXECUTED, Evil

DETECTOR = str(ROOT / 'configs' / 'atss_cpolynext_materials.py')


class Setting:
    """Somebody's own class, harmless and not known to be."""

    def __init__(self):
        self.value = 3


@pytest.fixture
def config(tmp_path):
    return tiny_config(ade20k_scenes(), tmp_path / 'work', **TINY_NETWORK)


@pytest.fixture
def trace(tmp_path):
    return tmp_path / 'trace'


def by_init_cfg(path, config):
    build(arch=ARCH, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()


def by_load_checkpoint(path, config):
    load_checkpoint(build(arch=ARCH), path)


def by_init_model(path, config):
    from mmseg.apis import init_model

    init_model(config, path, device='cpu')


def by_load_from(path, config):
    config.load_from = path
    Runner.from_cfg(config).load_or_resume()


def by_resuming(path, config):
    config.load_from, config.resume = path, True
    Runner.from_cfg(config).train()


def by_init_detector(path, config):
    from mmdet.apis import init_detector

    init_detector(DETECTOR, path, device='cpu')


def by_init_cfg_of_the_whole(path, config):
    config.model.init_cfg = dict(type='Pretrained', checkpoint=path)
    build_model(config).init_weights()


def by_init_cfg_of_a_head(path, config):
    config.model.decode_head.init_cfg = dict(type='Pretrained', checkpoint=path)
    build_model(config).init_weights()


def by_init_cfg_with_a_prefix(path, config):
    backbone = build(arch=ARCH)
    backbone.init_cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    backbone.init_weights()


def by_load_from_in_training(path, config):
    config.load_from = path
    Runner.from_cfg(config).train()


def by_mms_resume(path, config):
    """Without the hooks of this package's configs, and of a path that is given later."""
    config.custom_hooks = []
    config.default_hooks.checkpoint.type = 'CheckpointHook'
    Runner.from_cfg(config).resume(path)


def by_last_checkpoint(path, config):
    """As mmengine resumes: what stands in a file of the work dir is what it reads."""
    config.custom_hooks = [dict(type='CheckpointGuardHook')]
    config.default_hooks.checkpoint.type = 'CheckpointHook'
    config.resume = True
    work_dir = Path(config.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / 'last_checkpoint').write_text(path)
    Runner.from_cfg(config).train()


def by_inferencer(path, config):
    from mmseg.apis import MMSegInferencer

    MMSegInferencer(model=str(CONFIG), weights=path, device='cpu')


def by_a_reference_from_before(path, config):
    """A name that somebody bound before this package was imported."""
    from mmengine.runner import checkpoint

    keep = {'load': checkpoint.load_checkpoint}
    keep['load'](torch.nn.Sequential(build(arch=ARCH)), path)


def by_read(path, config):
    weights.read(path)


FOR_OUR_MODELS = [
    by_init_cfg,
    by_init_cfg_of_the_whole,
    by_init_cfg_of_a_head,
    by_init_cfg_with_a_prefix,
    by_load_checkpoint,
    by_a_reference_from_before,
    by_init_model,
    by_init_detector,
    by_inferencer,
    by_load_from,
    by_load_from_in_training,
    by_resuming,
    by_mms_resume,
    by_last_checkpoint,
    by_read,
]


@pytest.mark.heavy
@pytest.mark.parametrize('way', FOR_OUR_MODELS)
def test_the_keys_of_a_file_do_not_matter(tmp_path, config, trace, way):
    """Whoever writes a file chooses its keys: these are of no network of ours."""
    path = str(tmp_path / 'somebody.pth')
    content = dict(
        meta=dict(epoch=0, iter=1),
        state_dict={'conv1.weight': torch.ones(2)},
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        optimizer={},
        extra=Evil(trace),
    )
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='eval') as caught:
        way(path, config)
    assert not trace.exists() and f'unsafe:{path}' in str(caught.value)


@pytest.mark.heavy
def test_unsafe_in_last_checkpoint_does_not_count(tmp_path, config, trace):
    path = str(tmp_path / 'somebody.pth')
    torch.save(dict(state_dict={'conv1.weight': torch.ones(2)}, extra=Evil(trace)), path)
    with pytest.raises(CheckpointError, match="last_checkpoint in .* says 'unsafe:"):
        by_last_checkpoint(f'unsafe:{path}', config)
    assert not trace.exists()


@pytest.mark.parametrize('scheme', ['s3://', 'petrel://', 'pavi://'])
def test_storage_that_cannot_be_read_safely_is_refused(scheme):
    with pytest.raises(CheckpointError, match=f'cannot be read safely.*unsafe:{scheme}'):
        load_checkpoint(build(arch=ARCH), f'{scheme}bucket/weights.pth')


def load(path, backbone):
    weights.load(backbone, path)


def init_cfg(path, backbone):
    backbone.init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone.init_weights()


@pytest.mark.parametrize('way', [init_cfg, load])
def test_unsafe_reads_all_of_a_pickle(tmp_path, trace, way):
    path = tmp_path / 'weights.pt'
    torch.save(dict(state_dict=imagenet_weights(), extra=Evil(trace), setting=Setting()), path)
    backbone = build(arch=ARCH)
    way(f'unsafe:{path}', backbone)
    assert trace.read_text() == EXECUTED
    assert torch.equal(backbone.stem.weight, imagenet_weights()['stem.weight'])


# Other people's checkpoints


def test_other_peoples_files_load_as_they_are(tmp_path):
    """Average and weights side by side, marks of DDP, versions of modules, other content."""
    path = str(tmp_path / 'others.pth')
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state_dict = model.state_dict()
    content = dict(model=state_dict, ema={'module.0.weight': torch.ones(2)}, epoch=3)
    torch.save(content, path)
    loaded = CheckpointLoader.load_checkpoint(path)
    assert loaded.keys() == content.keys() and loaded['ema'].keys() == content['ema'].keys()
    torch.save(dict(state_dict=state_dict, meta=dict(epoch=1)), path)
    loaded = load_checkpoint(model, path)
    assert loaded['state_dict']._metadata['0']['version'] == 2
    assert loaded['meta'] == dict(epoch=1)
    torch.save([1, 2], path)
    assert CheckpointLoader.load_checkpoint(path) == [1, 2]
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        CheckpointLoader.load_checkpoint('absent.pth')
