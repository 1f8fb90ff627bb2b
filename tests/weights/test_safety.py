"""Nothing in PolyNeXt's files is executed; other people's load as without this package."""

import textwrap
from pathlib import Path

import pytest
import torch
from hostile import EXECUTED, Evil
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint

from helpers import (
    ARCH,
    CONFIG,
    ROOT,
    build,
    build_model,
    imagenet_weights,
    python,
    sample_as_ade20k,
    tiny_config,
)
from polynext_mm import weights
from polynext_mm.weights import CheckpointError

DETECTOR = str(ROOT / 'configs' / 'atss_cpolynext_materials.py')
pytestmark = pytest.mark.usefixtures('quick_configs')


class Setting:
    """Somebody's own class, harmless and not known to be."""

    def __init__(self):
        self.value = 3


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
    config.custom_hooks = []
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


@pytest.mark.parametrize('way', FOR_OUR_MODELS)
def test_the_keys_of_a_file_do_not_matter(tmp_path, trace, way):
    """Whoever writes a file chooses its keys: these are of no network of ours."""
    config = tiny_config(sample_as_ade20k(tmp_path), tmp_path / 'work')
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
    assert not trace.exists() and path in str(caught.value)


def test_unsafe_in_last_checkpoint_does_not_count(tmp_path, trace):
    config = tiny_config(sample_as_ade20k(tmp_path), tmp_path / 'work')
    path = str(tmp_path / 'somebody.pth')
    torch.save(dict(state_dict={'conv1.weight': torch.ones(2)}, extra=Evil(trace)), path)
    with pytest.raises(CheckpointError, match="last_checkpoint in .* says 'unsafe:"):
        by_last_checkpoint(f'unsafe:{path}', config)
    assert not trace.exists()


@pytest.mark.parametrize('scheme', ['s3://', 'petrel://', 'pavi://'])
def test_storage_that_cannot_be_read_safely_is_refused(scheme):
    with pytest.raises(CheckpointError, match=f'cannot be read safely.*unsafe:{scheme}'):
        load_checkpoint(build(arch=ARCH), f'{scheme}bucket/weights.pth')


@pytest.mark.parametrize(
    ('way', 'zipped'),
    [
        (by_init_cfg, True),
        (by_load_checkpoint, True),
        (by_load_checkpoint, False),
        (by_init_model, True),
        (by_load_from, True),
        (by_resuming, True),
        (by_read, True),
        (by_read, False),
    ],
)
def test_a_file_that_needs_code_is_refused_by_name_and_not_executed(tmp_path, trace, way, zipped):
    config = tiny_config(sample_as_ade20k(tmp_path), tmp_path / 'work')
    path = str(tmp_path / 'segmentor.pth')
    weight = {'backbone._orig_mod.cells.0.skip_weight': torch.ones(6)}
    torch.save(
        dict(meta=dict(config=''), state_dict=weight, extra=Evil(trace)),
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match='eval') as caught:
        way(path, config)
    assert not trace.exists()
    assert f'unsafe:{path}' in str(caught.value)


@pytest.mark.parametrize(
    'content',
    [
        lambda evil: dict(imagenet_weights(), evil=evil),
        lambda evil: dict(state_dict=dict(imagenet_weights(), evil=evil)),
        lambda evil: dict(ema=dict(deeper=imagenet_weights()), args=evil),
        lambda evil: [imagenet_weights(), evil],
        lambda evil: {evil: 0, 'model': imagenet_weights()},
    ],
    ids=['among weights', 'state_dict', 'deep', 'list', 'key'],
)
def test_wherever_the_code_is(tmp_path, trace, content):
    path = str(tmp_path / 'weights.pt')
    torch.save(content(Evil(trace)), path)
    with pytest.raises(CheckpointError, match='eval'):
        load_checkpoint(build(arch=ARCH), path)
    assert not trace.exists()


def test_getattr_reaches_nothing_but_history_buffers(tmp_path, trace):
    class Reach:
        def __reduce__(self):
            return getattr, (dict, 'fromkeys')

    path = str(tmp_path / 'weights.pt')
    torch.save(dict(imagenet_weights(), reach=Reach()), path)
    with pytest.raises(CheckpointError):
        weights.read(path)


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


def test_within_safe_reading_no_file_at_all_is_executed(tmp_path, trace):
    path = str(tmp_path / 'somebody.pth')
    torch.save(dict(state_dict={'conv1.weight': torch.ones(2)}, extra=Evil(trace)), path)
    with weights.safe_reading(), pytest.raises(CheckpointError, match='eval'):
        CheckpointLoader.load_checkpoint(path)
    assert not trace.exists()


# Other people's checkpoints, with this package imported and without

OTHERS = textwrap.dedent("""
    import pickle
    import sys
    import torch
    if sys.argv[2] == 'with':
        import polynext_mm
        ours = torch.nn.Sequential(polynext_mm.PolyNeXt('cpolynext_t'))  # which changes nothing
    from mmengine.model import BaseModule
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader, load_checkpoint


    class Own:
        value = 3


    sys.modules['__main__'].Own = Own
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    if sys.argv[2] == 'make':
        meta = dict(own=Own(), config='a = 1')
        content = dict(meta=meta, state_dict=model.state_dict(), extra={1: 2})
        torch.save(content, sys.argv[1])
        sys.exit()
    try:
        content = load_checkpoint(model, sys.argv[1])
        print('READ', sorted(content), content['meta']['own'].value, content['meta']['config'],
              sorted(content['state_dict']), content['extra'], model[0].weight.tolist())
    except pickle.UnpicklingError as error:  # upstream's mmengine refuses what the fork reads
        print('READ', str(error).splitlines()[0])
    torch.save([1, 2], sys.argv[1] + '.list')
    print('READ', CheckpointLoader.load_checkpoint(sys.argv[1] + '.list'))
    class Part(BaseModule):
        def __init__(self):
            super().__init__(dict(type='Pretrained', checkpoint=sys.argv[1]))
            self.add_module('0', torch.nn.Linear(2, 2))


    try:
        part = Part()
        part.init_weights()
        print('READ', part.get_submodule('0').weight.tolist())
    except pickle.UnpicklingError as error:
        print('READ', str(error).splitlines()[0])
    for wrong in ('absent.pth', sys.argv[0]):
        try:
            CheckpointLoader.load_checkpoint(wrong)
        except Exception as error:
            print('READ', type(error).__name__, error)
""")


def test_other_peoples_files_load_as_without_the_import(tmp_path):
    script, file = tmp_path / 'script.py', tmp_path / 'others.pth'
    script.write_text(OTHERS)
    python(script, file, 'make')
    printed = [
        [
            line
            for line in python(script, file, how, cwd=tmp_path).splitlines()
            if line.startswith('READ')
        ]
        for how in ('with', 'without')
    ]
    assert len(printed[0]) == 5
    assert '3 a = 1' in printed[0][0] or 'Weights only load failed' in printed[0][0]
    assert printed[0] == printed[1]
